"""How much of the machine a step uses: model FLOPs from the step's counts, their share of the GPU's peak, peak memory.

Model FLOPs are the planner's (`costs/stage_work.py`): forward, gradients of activations, gradients of what is trained;
recomputation and the upper half of causal attention do not count. Where the planner counts every position of a row, a
log counts real tokens: padding is computed, but it is no work that anybody wants. All numbers are the host's own.
"""

from dataclasses import replace

from megatron_moellava import platform
from megatron_moellava.backbones import Backbone
from megatron_moellava.config import ParallelConfig, RunConfig
from megatron_moellava.costs.gpus import GIB, gpu_of_device
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.stage_work import Load, model_flops
from megatron_moellava.data.batch import Counts
from megatron_moellava.towers import Tower

TERA = 1e12


class Throughput:
    """Numbers for the log of a run on `world_size` processes."""

    def __init__(self, run: RunConfig, backbone: Backbone, tower: Tower, world_size: int):
        whole = replace(run, parallel=ParallelConfig())  # the FLOPs of a model do not depend on who computes them
        self.layout = Layout(run=whole, backbone=backbone, tower=tower, world_size=1)
        self.world_size = world_size
        name = platform.device_name()
        gpu = gpu_of_device(name) if name else None
        self.peak = gpu.peak(fp8=run.training.fp8_recipe is not None) if gpu else None  # FLOP per second and device

    def flops(self, counts: Counts) -> float:
        """Model FLOPs of what `counts` counts, forward and backward."""
        tower = self.layout.tower
        load = Load(
            tokens=counts.real_tokens,
            length=counts.squared_lengths / max(counts.real_tokens, 1),
            images=counts.tower_inputs / (tower.num_patches if tower.native else 1),
            samples=counts.samples,
            apart=counts.apart_inputs or (0,) * len(self.layout.branches),
            reach=counts.tower_squares / max(counts.tower_inputs, 1) if tower.native else None,
        )
        return model_flops(self.layout, load)

    def numbers(self, counts: Counts, seconds: float) -> dict[str, float]:
        """Of one step over the global batch. `mfu` where the GPU's peak is known; memory of this process."""
        rate = self.flops(counts) / seconds / self.world_size
        mfu = {"mfu": rate / self.peak} if self.peak else {}
        return {"tflops_per_device": rate / TERA, **mfu, "peak_memory_gib": platform.peak_memory_bytes() / GIB}
