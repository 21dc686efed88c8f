"""How long a quickstart will take on this machine: a probe of about a second, and what each part costs in passes of it.

The probe is a small MLP of the quickstart's sizes, forwards and backwards, in the precision that the run will have, on all
processes at once: what slows the run slows the probe likewise. `make bench BENCH=quickstart` measures the costs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from plans import SMALL

TOKENS, HIDDEN, FFN = 2048, 128, 384  # of a row and of llama-tiny
PROBE_SECONDS = 1.0
ROWS = 2  # of a step, over all processes
# In passes of the probe, which has no attention and no small operations, so that products without bf16 units weigh more in it:
# a step of one row, of the run's own length, and a question; of a dense model and of one with experts. Steps are dearer than
# the benchmark's by a quarter: a run's data workers and its other process want the same cores.
STEP = {
    "bf16": {"llama-tiny": {False: 28.0, True: 42.0}, SMALL: {False: 9.5, True: 15.0}},
    "fp32": {"llama-tiny": {False: 19.0, True: 24.0}, SMALL: {False: 4.4, True: 6.0}},
}
QUESTION = {"bf16": {False: 0.36, True: 0.54}, "fp32": {False: 0.24, True: 0.28}}
TOWER_SECONDS = 0.06  # of a step of the tower's pretraining, in fp32 on all cores
START_SECONDS = 6.0  # of a part, beside its steps: building and loading the model, saving


@dataclass(frozen=True, slots=True)
class Speed:
    """`seconds`: of a pass on one process, while the others compute too."""

    seconds: float
    processes: int
    precision: str

    @classmethod
    def of_this_machine(cls, precision: str) -> "Speed":
        """By the probe, on every process at once. Zero on a GPU, of which the costs here say nothing."""
        import torch.distributed as dist

        from megatron_moellava import platform

        if platform.HAS_CUDA:
            return cls(0.0, dist.get_world_size(), precision)
        slowest: list[float] = [0.0] * dist.get_world_size()
        dist.barrier()
        dist.all_gather_object(slowest, seconds_of_a_pass(precision))
        return cls(max(slowest), dist.get_world_size(), precision)

    def training(self, steps: int, questions: int, plan: dict) -> float:
        """Seconds of a run of so many steps and of asking so many questions after it. `plan`: of plans.PLANS."""
        is_moe, measured = plan["stage"] == 3, "fp32" if self.precision == "fp32" else "bf16"
        size = SMALL if plan.get("backbone") == SMALL else "llama-tiny"
        passes = steps * max(1, ROWS // self.processes) * STEP[measured][size][is_moe]
        passes += questions / self.processes * QUESTION[measured][is_moe]
        return self._some(passes)

    def tower(self, steps: int) -> float:
        """Seconds of the tower's pretraining."""
        return steps * TOWER_SECONDS + START_SECONDS if self.seconds else 0.0

    def _some(self, passes: float) -> float:
        return passes * self.seconds + START_SECONDS if self.seconds else 0.0


def said_time(seconds: float) -> str:
    """What the run says at its start, when so much is left."""
    return f"this should take about {max(1, round(seconds / 60))} min here"


def seconds_of_a_pass(precision: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Forward and backward pass of the probe, the mean over about a second."""
    import torch

    from megatron_moellava.model.configuration import DTYPES

    generator = torch.Generator().manual_seed(0)  # the process's own is left alone
    dtype = DTYPES[precision]

    def drawn(*shape: int):
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens_SD, up_DF, down_FD = drawn(TOKENS, HIDDEN), drawn(HIDDEN, 2 * FFN), drawn(FFN, HIDDEN)
    for weight in (up_DF, down_FD):
        weight.mul_(0.05).requires_grad_()

    def once() -> None:
        gate_SF, value_SF = (tokens_SD @ up_DF).chunk(2, dim=1)
        output_SD = (torch.nn.functional.silu(gate_SF) * value_SF) @ down_FD + tokens_SD
        output_SD.float().square().mean().backward()

    once()
    passes, started = 0, clock()
    while (spent := clock() - started) < PROBE_SECONDS:
        once()
        passes += 1
    return spent / passes
