"""A slow rank slows all: in synchronous training everybody's step takes as long as the slowest rank's own work.

What a rank does by itself is waiting for its data and its forward and backward passes up to the reduction of the
gradients; the rest of a step is waiting for others. Ranks of one tensor-, pipeline- or expert-parallel group wait for
each other inside the passes, so the whole group of a slow GPU shows.
"""

import statistics
import time

import torch
import torch.distributed as dist

from megatron_moellava import platform

TOLERANCE = 1.3  # times the median
PATIENCE = 2  # measurements in a row before a rank is named: one alone may be a hiccup


class Stragglers:
    """Measures every `interval`-th step (0: never); `measure` returns a message when a rank keeps being slow."""

    def __init__(self, interval: int):
        self.interval = interval if dist.get_world_size() > 1 else 0
        self.started, self.own = 0.0, 0.0
        self.suspect, self.in_a_row = -1, 0

    def begin(self) -> None:
        """Own work starts, or goes on after a collective."""
        self.started = time.perf_counter()

    def pause(self, iteration: int) -> None:
        """A collective that all data-parallel ranks share comes next; own work since `begin` counts."""
        if self._measured(iteration):
            platform.synchronize()
            self.own += time.perf_counter() - self.started

    def measure(self, iteration: int) -> tuple[dict[str, float], str | None]:
        """(numbers for the log, message); collective, on measured steps only."""
        if not self._measured(iteration):
            return {}, None
        mine = torch.tensor([self.own], dtype=torch.float64, device=platform.device())
        seconds = torch.empty(dist.get_world_size(), dtype=torch.float64, device=platform.device())
        dist.all_gather_into_tensor(seconds, mine)
        self.own = 0.0
        return self._judge(seconds.tolist())

    def _measured(self, iteration: int) -> bool:
        return bool(self.interval) and iteration % self.interval == 0

    def _judge(self, seconds: list[float]) -> tuple[dict[str, float], str | None]:
        median, slowest = statistics.median_low(seconds), max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[slowest] / max(median, 1e-9)
        numbers = {"slowest_rank": float(slowest), "slowest_rank_ratio": ratio}
        if ratio < TOLERANCE:
            self.suspect, self.in_a_row = -1, 0
            return numbers, None
        self.in_a_row = self.in_a_row + 1 if slowest == self.suspect else 1
        self.suspect = slowest
        if self.in_a_row < PATIENCE:
            return numbers, None
        return numbers, (
            f"rank {slowest} is slow: {seconds[slowest]:.3f} s of its own work a step, the median rank has {median:.3f} s "
            f"and waits for it; look at its GPU (clocks, temperature, other processes), its host and its data"
        )
