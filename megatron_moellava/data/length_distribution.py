"""The length law of LLaVA's 665k instruction mix, from published counts, for packing figures without the data.

Rows per source: LLaVA-1.5 (arXiv 2310.03744, table 7; 665,298 rows, 40,688 of them text only). Questions per image:
VQAv2 443,757 over 82,783 images, GQA 943,000 over 72,140, OCR-VQA 801,579 over 80,000 (LLaVA joins the questions of an
image into one conversation); RefCOCO and Visual Genome rows hold about ten boxes. Tokens per question and answer are
our estimate for a 32k vocabulary, ShareGPT's lengths are those of its 2,048-token cut. Within a source lengths are
log-normal.
"""

import numpy as np

PROMPT_TOKENS = 40  # system prompt, roles, separators of the first turn
# name: (rows in thousands, mean text tokens, log-normal sigma, images)
SOURCES = {
    "LLaVA conversation": (58, 240, 0.35, 1),
    "LLaVA detail": (23, 150, 0.25, 1),
    "LLaVA reasoning": (77, 180, 0.25, 1),
    "ShareGPT": (40, 1300, 0.7, 0),
    "VQAv2": (83, 97, 0.45, 1),
    "GQA": (72, 285, 0.6, 1),
    "OKVQA": (9, 22, 0.3, 1),
    "OCR-VQA": (80, 200, 0.3, 1),
    "A-OKVQA": (66, 70, 0.3, 1),
    "TextCaps": (22, 35, 0.3, 1),
    "RefCOCO": (48, 400, 0.7, 1),
    "Visual Genome": (86, 420, 0.4, 1),
}


def sample_lengths(count: int, num_features: int, max_length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, images) of `count` random rows, images expanded, cut at max_length."""
    rng = np.random.default_rng(seed)
    rows, means, sigmas, images = (np.array(column, dtype=float) for column in zip(*SOURCES.values(), strict=True))
    source = rng.choice(len(rows), size=count, p=rows / rows.sum())
    text = means[source] * np.exp(sigmas[source] * rng.standard_normal(count) - sigmas[source] ** 2 / 2)
    tokens = PROMPT_TOKENS + text + images[source] * num_features
    return np.minimum(tokens, max_length).astype(int), images[source].astype(int)


def packing_bound(tokens: np.ndarray, capacity: int, grid: int = 16) -> float:
    """No packing of many such samples into rows of `capacity` has a larger useful share. Needs scipy (extra: dev).

    Samples are rounded down to the grid, which only helps the packing, and may be split over rows in any fraction
    (the linear relaxation): a row is a path from 0 to `capacity`, a sample an arc of its length, and the arcs of each
    length must carry as much as there are samples (Valerio de Carvalho 1999, arc-flow bin packing).
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    sizes, counts = np.unique(np.maximum(tokens // grid, 1), return_counts=True)
    length = capacity // grid
    arcs = np.array([(kind, start) for kind, size in enumerate(sizes) for start in range(length - size + 1)])
    kinds, starts = arcs.T
    tails = np.concatenate([starts, np.arange(length)])  # the last arcs leave a place empty
    heads = np.concatenate([starts + sizes[kinds], np.arange(length) + 1])
    every = np.arange(len(tails))
    signs, ends = np.repeat([1.0, -1.0], len(tails)), np.concatenate([heads, tails])
    flow = coo_array((signs, (ends, np.tile(every, 2))), shape=(length + 1, len(tails))).tocsr()[1:length]
    carried = coo_array((-np.ones(len(kinds)), (kinds, every[: len(kinds)])), shape=(len(sizes), len(tails)))
    demand = -counts / len(tokens)
    found = linprog(tails == 0, A_ub=carried.tocsr(), b_ub=demand, A_eq=flow, b_eq=np.zeros(length - 1), method="highs")
    return float(tokens.mean() / (capacity * found.fun))
