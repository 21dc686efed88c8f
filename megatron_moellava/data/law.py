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
