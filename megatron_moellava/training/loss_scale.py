"""fp16's loss scale: Megatron-Core's dynamic scaler, one for all parameters.

A gradient below 6e-8 is 0 in fp16, so the loss is multiplied by a scale before the backward pass and the gradients are divided
by it, in fp32, before the update. A step whose gradients overflow is skipped and the scale halved; after many good steps it
doubles.

Megatron-Core gives the optimizers of dense and of expert parameters a scaler each, which follows its own parameters, while the
loss is multiplied by the first one's: once only experts overflow, their gradients are divided by another number than they were
multiplied by. Here all share one.
"""

import torch

from megatron_moellava.config import RunConfig

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer


class LossScale(DynamicGradScaler):
    """A scale that moves once for each step, by the gradients of all parameters on all ranks."""

    is_divided = (
        False  # this step's gradients have been divided already: preparing them once more leaves them as they are
    )

    @property
    def inv_scale(self) -> torch.Tensor:
        """What gradients are multiplied by, [1] in fp32."""
        return torch.ones_like(self._scale) if self.is_divided else super().inv_scale

    def update(self, found_inf: bool) -> None:
        """Megatron-Core's call, by each of the chained optimizers; `advance` does it for all."""

    def advance(self, found_inf: bool) -> None:
        """Move the scale after a step."""
        super().update(found_inf)

    @property
    def at_minimum(self) -> bool:
        """It cannot become smaller, so a smaller one cannot help."""
        return bool(self._scale <= self.min_scale)

    def to_json(self) -> dict:
        """Its state, exactly: a scale is a power of two."""
        return {
            "scale": float(self._scale),
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def from_json(self, state: dict) -> None:
        """Go on from what `to_json` said."""
        self._scale: torch.Tensor = torch.full_like(self._scale, state["scale"])
        self._growth_tracker, self._hysteresis_tracker = state["growth_tracker"], state["hysteresis_tracker"]


def share_loss_scale(
    run: RunConfig, optimizer: ChainedOptimizer, chunks: list[DistributedDataParallel]
) -> LossScale | None:
    """One scale for the loss and for every optimizer of the chain, stand-ins included; None unless the run is in fp16."""
    if run.training.precision != "fp16":
        return None
    options = run.optimizer
    scale = LossScale(
        initial_scale=options.initial_loss_scale,
        min_scale=options.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=options.loss_scale_window,
        hysteresis=options.hysteresis,
    )
    for part in optimizer.chained_optimizers:
        part.grad_scaler = scale
    for chunk in chunks:  # the pipeline's last stage multiplies the loss, and every stage its routers' losses
        chunk.config.grad_scale_func = optimizer.scale_loss
    return scale
