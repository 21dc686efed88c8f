"""Every row of a data set once, or its first ones: the same micro-batches whatever the layout and however often asked."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import DataError
from megatron_moellava.data.loader import Loader


def dealt_once(loader: Loader, count: int, size: int) -> Iterator[tuple[int, dict]]:
    """(rows that are this data set's, {"batch", "events"}) of `count` micro-batches of `size` rows of this rank.

    Data-parallel ranks take them in turn, as training deals them; what is missing at the end is filled with the last row.
    """
    stream, pipeline = loader.micro_batches.stream, loader.micro_batches.pipeline
    items = stream.plan(0)
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
    if parallel.sum_over_ranks([fault is not None])[0]:
        faults: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
        raise DataError(next(text for text in faults if text is not None))
    return read
