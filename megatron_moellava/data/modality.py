"""The original's order of samples (specification 4.5): each global batch is all images or all text, lengths grouped.

A global batch is `chunks` micro-batches (data-parallel ranks x accumulation steps) of `micro_batch_size` samples.
Micro-batch m goes to rank m % world_size, as accelerate deals them out; the last round wraps around to the start.
Unlike the original, which draws from torch's global generator, the order depends on seed and epoch alone.
"""

import json
from collections.abc import Iterator

import numpy as np
import torch

from megatron_moellava.config import DataError
from megatron_moellava.data.index import Index
from megatron_moellava.data.pipeline import Pipeline

from megatron.energon import SkipSample


def epoch_order(lengths: np.ndarray, micro_batch_size: int, chunks: int, generator: torch.Generator) -> list[int]:
    """Row numbers in order. `lengths`: words, negative for text-only rows."""
    lengths = np.where(lengths == 0, -1, lengths)
    image_rows, text_rows = np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)
    if not len(image_rows) or not len(text_rows):
        return _grouped(np.abs(lengths), micro_batch_size, chunks, generator)
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
    made, totals = [[] for _ in range(chunks)], [0.0] * chunks
    for row in rows:
        shortest = totals.index(min(totals))
        made[shortest].append(row)
        totals[shortest] += lengths[row]
        if len(made[shortest]) == len(rows) // chunks:
            totals[shortest] = float("inf")
    return made


class Rows(torch.utils.data.Dataset):
    """Rows of the indexed sources by number, sources one after the other; an item is a list of rows -> one batch."""

    def __init__(self, indices: list[Index], pipeline: Pipeline):
        self.pipeline = pipeline
        self.paths = [index.path for index in indices]
        self.starts = np.cumsum([0, *(index.rows for index in indices)])
        self.positions = [index.positions for index in indices]
        self.offsets = [np.fromfile(path.with_suffix(".jsonl.idx"), dtype=np.uint64) for path in self.paths]

    def __getitem__(self, rows: list[int]) -> dict:
        samples = []
        for row in rows:
            try:
                samples.append(self.pipeline.postencode_sample(self.pipeline.cook(self._read(row))))
            except SkipSample:
                continue
        return self.pipeline.batch(samples) if samples else self.pipeline.deliver(None)

    def _read(self, row: int) -> dict:
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        line = int(self.positions[source][row - self.starts[source]])
        start, end = self.offsets[source][line : line + 2]
        with open(self.paths[source], "rb") as file:
            file.seek(int(start))
            content = file.read(int(end - start))
        return {
            "json": json.loads(content),
            "__key__": str(row),
            "__restore_key__": (),
            "__subflavors__": {"source": source},
        }


class LengthGroupedStream:
    """Endless batches of one rank; the state is epoch and position, whatever the number of workers."""

    def __init__(
        self, rows: Rows, lengths: np.ndarray, *, seed, rank, world_size, micro_batch_size, chunks, num_workers
    ):
        self.rows, self.lengths, self.seed = rows, np.asarray(lengths), seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.micro_batch_size, self.chunks = micro_batch_size, chunks
        self.epoch, self.position = 0, 0

    def plan(self, epoch: int) -> list[list[int]]:
        """The micro-batches of this rank."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = epoch_order(self.lengths, self.micro_batch_size, self.chunks, generator)
        round_size = self.micro_batch_size * self.world_size
        missing = -len(order) % round_size
        order += (order * (missing // len(order) + 1))[:missing]
        size = self.micro_batch_size
        starts = range(self.rank * size, len(order), round_size)
        return [order[start : start + size] for start in starts]

    def __iter__(self) -> Iterator[dict]:
        while True:
            plan = self.plan(self.epoch)[self.position :]
            loader = torch.utils.data.DataLoader(
                self.rows,
                batch_size=None,
                sampler=plan,
                num_workers=self.num_workers,
                multiprocessing_context="fork" if self.num_workers else None,
            )
            for delivered in loader:
                self.position += 1
                yield delivered
            self.epoch, self.position = self.epoch + 1, 0

    def close(self) -> None:
        """Nothing to do: an epoch's workers end with its iterator."""

    def save(self) -> dict:
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, saved: dict) -> None:
        self.epoch, self.position = saved["epoch"], saved["position"]


def check_sources(data) -> None:
    if any(source.weight != 1 for source in data.sources):
        raise DataError("data.sampler=modality_length reads every row once per epoch; set all data.sources.weight to 1")
    if data.packing:
        raise DataError("data.sampler=modality_length is of the padded mode; set data.packing=false")
