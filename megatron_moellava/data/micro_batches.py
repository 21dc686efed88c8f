"""Micro-batches of one rank, made by worker processes in the order of a `Stream`, with the position to resume at."""

from collections import deque
from collections.abc import Iterator

import torch

from megatron_moellava.config import DataError
from megatron_moellava.data.order import Position, Stream
from megatron_moellava.data.pipeline import Pipeline


class MicroBatches:
    """Endless {"batch", "events", "epoch"}; the state does not know of ranks and workers."""

    def __init__(self, pipeline: Pipeline, stream: Stream, *, num_workers: int):
        self.pipeline, self.stream, self.num_workers = pipeline, stream, num_workers
        self.position = Position(0, 0)  # after the last micro-batch that was delivered
        self._ahead: deque[tuple[int, Position]] = deque()  # (epoch, position after it) of those on their way

    def items(self, epoch: int) -> int:
        """Micro-batches of an epoch, over all ranks."""
        return len(self.stream.plan(epoch))

    def __iter__(self) -> Iterator[dict]:
        loader: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
            self.pipeline,  # type: ignore[arg-type]  # a map from lists of numbers is all that a DataLoader needs
            batch_size=None,
            sampler=self._numbers(),
            num_workers=self.num_workers,
            multiprocessing_context="fork" if self.num_workers else None,
        )
        return self._delivered(iter(loader))  # not a generator itself: the workers are forked here, and not later

    def _delivered(self, made: Iterator[dict]) -> Iterator[dict]:
        for delivered in made:
            epoch, self.position = self._ahead.popleft()
            yield delivered | {"epoch": epoch}

    def _numbers(self) -> Iterator[list[int]]:
        for epoch, samples, after in self.stream.from_(self.position):
            self._ahead.append((epoch, after))
            yield samples

    def save(self) -> dict:
        """The state after the last delivered micro-batch, plain JSON; `rounds` in the midst of a step that is dealt alone."""
        position = self.position
        return {"epoch": position.epoch, "position": position.items} | (
            {"rounds": position.rounds} if position.rounds else {}
        )

    def restore(self, saved: dict) -> None:
        """Continue after a saved state. Raises DataError where it cannot be one of this data."""
        epoch, items, rounds = saved["epoch"], saved["position"], saved.get("rounds", 0)
        whole = all(type(number) is int and number >= 0 for number in (epoch, items, rounds))
        if not whole or items > self.items(epoch) or rounds >= self.stream.rounds:
            raise DataError(f"the loader's state cannot be restored ({saved}); the checkpoint is damaged")
        self.position = Position(epoch, items, rounds)
