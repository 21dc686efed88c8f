"""Token lengths of a source, and how well they pack."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataError, Modality
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.index import Index
from megatron_moellava.data.packing import pack_epoch
from megatron_moellava.data.regions import stand_in
from megatron_moellava.data.sample import BadSample, Sample, parse_record

LIMIT = 20_000  # rows that are tokenised


def token_lengths(
    index: Index,
    encoder: Encoder,
    ignore_keys: tuple[str, ...] = (),
    modalities: tuple[Modality, ...] = (),
    *,
    limit: int = LIMIT,
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(tokens, images, unusable rows by reason) of up to `limit` rows, which are in random order; images are expanded,
    samples cut at seq_length. DataError when no row can be used."""
    from tqdm import tqdm

    tokens, images = [], []
    unusable: Counter[str] = Counter()
    example = ""
    with open(index.path) as file:
        for number, line in enumerate(tqdm(file, total=min(index.rows, limit), desc="Tokenising", unit=" rows")):
            if number == limit:
                break
            try:
                content = json.loads(line)
                if "bad" in content:
                    raise BadSample(*content["bad"])
                where = f"{content['file']} row {content['row']}"
                limits: dict = {"max_images": 10**6, "ignore_keys": ignore_keys, "modalities": modalities}
                sample = parse_record(content["record"], origin=where, **limits)
                encoded = encoder(with_stand_ins(sample))
            except BadSample as error:
                example = example or str(error)
                unusable[error.reason] += 1
                continue
            tokens.append(len(encoded))
            images.append(len(encoded.images))
    if not tokens:
        raise DataError(f"no row of {index.path.parent.name} can be used; the first: {example}")
    return np.array(tokens), np.array(images), dict(unusable)


def with_stand_ins(sample: Sample) -> Sample:
    """The sample with numbers of the usual length for its boxes: no picture is opened here."""
    turns = tuple(replace(turn, text=stand_in(turn.text, sample.regions)) for turn in sample.turns)
    return replace(sample, turns=turns, regions=())


def packing(lengths: np.ndarray, seq_length: int, buffer: int) -> list[list[int]]:
    """The rows that the loader makes of an epoch of these samples in this order, as indices."""
    return pack_epoch(range(len(lengths)), [int(length) for length in lengths], seq_length, buffer)


def describe(tokens: np.ndarray, images: np.ndarray, seq_length: int, buffer: int) -> dict:
    """Counts, token lengths and useful shares of one source, packed and padded.

    `tokens` and `images`: per sample; `buffer`: samples that packing chooses from.
    """
    rows = packing(tokens, seq_length, buffer)
    filled = [int(tokens[row].sum()) for row in rows]
    grouped = np.array_split(tokens, max(1, len(tokens) // 8))
    padded = sum(len(part) * int(part.max()) for part in grouped if len(part))
    return {
        "samples": len(tokens),
        "images": int(images.sum()),
        "text_only_share": float((images == 0).mean()),
        "tokens_mean": float(tokens.mean()),
        "tokens_median": float(np.median(tokens)),
        "tokens_max": int(tokens.max()),
        "samples_per_row": len(tokens) / max(1, sum(tokens) / seq_length),
        "packed_useful_share": sum(filled) / (seq_length * len(rows)) if rows else None,
        "padded_useful_share": float(tokens.sum() / padded),  # micro-batches of 8 in random order
    }


def plot(tokens: np.ndarray, images: np.ndarray, path: str | Path, title: str) -> None:
    """Histogram of the token lengths, with and without images, as a picture file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    groups = [tokens[images > 0], tokens[images == 0]]
    axis.hist(groups, bins=60, stacked=True, label=["with images", "text only"], color=["#3572b0", "#e08a2e"])
    axis.set(xlabel="tokens per sample, images included", ylabel="samples", title=title)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
