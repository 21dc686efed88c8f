"""The original's order of samples (specification 4.5): each global batch is all images or all text, lengths grouped.

A global batch is `chunks` micro-batches (data-parallel ranks x accumulation steps) of `micro_batch_size` samples.
Micro-batch m goes to rank m % world_size, as accelerate deals them out; the last round wraps around to the start.
Unlike the original, which draws from torch's global generator, the order depends on seed and epoch alone.
"""

import numpy as np
import torch

from megatron_moellava.config import DataError


def epoch_order(lengths: np.ndarray, micro_batch_size: int, chunks: int, generator: torch.Generator) -> list[int]:
    """Row numbers in order. `lengths`: words, negative for text-only rows."""
    lengths = np.where(lengths == 0, -1, lengths)
    image_rows, text_rows = np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)
    if not len(image_rows) or not len(text_rows):
        # As in the original, text alone keeps its sign: shortest first, and batches of like lengths.
        return _grouped(lengths, micro_batch_size, chunks, generator)
    size = micro_batch_size * chunks
    full, rest = [], []
    for rows in (image_rows, text_rows):
        order = [int(rows[i]) for i in _grouped(np.abs(lengths[rows]), micro_batch_size, chunks, generator)]
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        full += parts[:-1]
        rest += parts[-1]
    shuffled = [full[i] for i in torch.randperm(len(full), generator=generator)]
    return [row for part in [*shuffled, sorted(rest)] for row in part]


def _grouped(lengths: np.ndarray, micro_batch_size: int, chunks: int, generator: torch.Generator) -> list[int]:
    """A random permutation, cut into global batches; in each, micro-batches of similar total length."""
    order, size = torch.randperm(len(lengths), generator=generator).tolist(), micro_batch_size * chunks
    result = []
    for start in range(0, len(order), size):
        part = sorted(order[start : start + size], key=lambda i: -lengths[i])  # stable, as the original's sort
        for chunk in _even_chunks(part, lengths, chunks):
            result += chunk
    return result


def _even_chunks(rows: list[int], lengths: np.ndarray, chunks: int) -> list[list[int]]:
    """Longest first into the chunk that is shortest so far; an uneven number of rows is dealt out in turn."""
    if len(rows) % chunks:
        return [rows[i::chunks] for i in range(chunks)]
    made: list[list[int]] = [[] for _ in range(chunks)]
    totals = [0.0] * chunks
    for row in rows:
        shortest = totals.index(min(totals))
        made[shortest].append(row)
        totals[shortest] += lengths[row]
        if len(made[shortest]) == len(rows) // chunks:
            totals[shortest] = float("inf")
    return made


def modality_plan(
    lengths: np.ndarray, *, seed: int, epoch: int, micro_batch_size: int, chunks: int, world_size: int
) -> list[list[int]]:
    """The micro-batches of an epoch over all ranks."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order = epoch_order(np.asarray(lengths), micro_batch_size, chunks, generator)
    missing = -len(order) % (micro_batch_size * world_size)
    order += (order * (missing // len(order) + 1))[:missing]
    return [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]


def check_sources(data, sources) -> None:
    """Raise DataError where sources or mode do not fit the original's order: weights, shards, packing."""
    if any(source.weight != 1 for source in sources):
        raise DataError(
            "data.sampler=modality_length reads every row once per epoch; set all data.sources.weight to 1, and list each once"
        )
    if any(source.index is None for source in sources):
        raise DataError("data.sampler=modality_length needs to know all lengths: use LLaVA JSON files, not shards")
    if data.packing:
        raise DataError("data.sampler=modality_length is of the padded mode; set data.packing=false")
