"""Every row of a data set once, or its first ones: the same micro-batches whatever the layout and however often asked.

And a model as it is used, not trained, through which they go: the reference of stage 4, the teacher of a distillation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.checkpoint.base import base_of
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.config import DataError, LoraConfig, RunConfig, from_dict
from megatron_moellava.data.batch import Batch, from_wire
from megatron_moellava.data.loader import Loader
from megatron_moellava.data.order import Items
from megatron_moellava.model.build import build_model
from megatron_moellava.model.weights import load_with_base
from megatron_moellava.training.broadcast import broadcast_batch
from megatron_moellava.training.schedule import ROWS_PER_STAGE, run_schedule


def dealt_once(loader: Loader, count: int, size: int, items: Items | None = None) -> Iterator[tuple[int, dict]]:
    """(rows that are this data set's, {"batch", "events"}) of `count` micro-batches of `size` rows of this rank.

    Data-parallel ranks take them in turn, as training deals them; what is missing at the end is filled with the last row.
    `items`: what is dealt; None: the first epoch.
    """
    stream, pipeline = loader.micro_batches.stream, loader.micro_batches.pipeline
    items = stream.plan(0) if items is None else items
    first = range(parallel.data_parallel_rank(), count * stream.world_size, stream.world_size)
    starts = [number * size for number in first]
    numbers = [
        [sample for place in range(start, start + size) for sample in items[min(place, len(items) - 1)]]
        for start in starts
    ]
    reading: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        pipeline,  # type: ignore[arg-type]  # a map from lists of numbers is all that a DataLoader needs
        batch_size=None,
        sampler=numbers,
        num_workers=pipeline.data.num_workers,
        multiprocessing_context="fork" if pipeline.data.num_workers else None,
    )
    for start, delivered in zip(starts, reading, strict=True):
        yield max(0, min(size, len(items) - start)), delivered


def read_together(reader: Iterator | None, count: int, what: str) -> list:
    """The next `count` of a reader, or as many Nones where nothing is read. Collective: a fault of any rank is raised on
    all."""
    read: list = [None] * count
    fault = None
    if reader is not None:
        try:
            read = [next(reader) for _ in range(count)]
        except DataError as error:
            fault = f"{what}: {str(error).rpartition('DataError: ')[2].strip()}"
    raise_together(fault)
    return read


def raise_together(fault: str | None) -> None:
    """DataError on all ranks where any rank has found a fault. Collective."""
    if parallel.sum_over_ranks([fault is not None])[0]:
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        raise DataError(next(text for text in faults if text is not None))


# --- a model that is only looked at -----------------------------------------------------------------------------------


def model_as_used(run: RunConfig, checkpoint: Path) -> list:
    """The chunks of a checkpoint of `run`'s model: nothing is dropped, recomputed or emulated, and no adapter is new."""
    description = read_description(checkpoint)
    lora = from_dict(LoraConfig, description.adapter["lora"]) if description.adapter else None
    training = replace(run.training, lora=lora, fp8_recipe=None, recompute="none", recompute_tower=False)
    chunks = build_model(replace(run, training=training))
    load_with_base(checkpoint, chunks, base_of(checkpoint, description))
    for chunk in chunks:
        chunk.eval()
    return chunks


def each_row_once(run: RunConfig) -> RunConfig:
    """The run whose loader has every row of its sources in an epoch, in an order that no seed changes."""
    sources = tuple(replace(source, weight=1.0) for source in run.data.sources)
    return replace(run, data=replace(run.data, sources=sources), training=replace(run.training, seed=0))


def passed_once(
    run: RunConfig,
    chunks: list,
    loader: Loader | None,
    count: int,
    step: Callable,
    what: str,
    items: Items | None = None,
) -> Iterator[tuple[Batch, Any]]:
    """(micro-batch, what `step` made of it) on the last pipeline stage, in rounds that keep a pipeline full. Collective.

    `count`: how many rows `items` are (None: the first epoch of the loader); `step` as `run_schedule` has it.
    """
    size = run.training.micro_batch_size
    round_size = ROWS_PER_STAGE * parallel.num_stages()  # micro-batches of a rank; a multiple of the stages
    rounds = math.ceil(count / (round_size * parallel.data_parallel_size() * size))
    reader = _usable(run, loader, rounds * round_size, items) if loader is not None else None
    for _ in range(rounds):
        read = read_together(reader, round_size, what)
        batches = [broadcast_batch(batch) for batch in read]
        found = run_schedule(
            step, chunks, batches, seq_length=run.data.seq_length, micro_batch_size=size, forward_only=True
        )
        yield from zip(batches, found, strict=False)  # none on stages before the last


def _usable(run: RunConfig, loader: Loader, count: int, items: Items | None) -> Iterator[Batch]:
    """Micro-batches of this rank; one whose rows are all bad becomes another one again, if bad rows are tolerated."""
    last: Batch | None = None
    for _, delivered in dealt_once(loader, count, run.training.micro_batch_size, items):
        skipped = delivered["events"].skipped
        if delivered["batch"] is not None:
            last = from_wire(delivered["batch"])
        if skipped and (last is None or not run.data.max_skip_share):
            reason, message, _ = skipped[0]
            raise DataError(f"{message} ({reason}); mend it or leave it out")
        assert last is not None
        yield last
