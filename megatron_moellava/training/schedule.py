"""Batches through the model by Megatron-Core's schedules, whatever the pipeline."""

from collections.abc import Callable, Sequence

import torch

from megatron_moellava import parallel, platform

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

# Of whoever only looks: packed rows in a pipeline at a time, per stage: enough to keep it full, few enough to hold.
ROWS_PER_STAGE = 8


def run_schedule(
    step: Callable,
    chunks: Sequence[torch.nn.Module],
    batches: Sequence,
    *,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list:
    """What the loss function of `step(iterator, chunk)` returned second, for each batch, on the last pipeline stage.

    Every rank of a pipeline calls it with equally many batches; other stages get an empty list.
    """
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def scale_router_losses(config: TransformerConfig, num_microbatches: int) -> None:
    """Let the losses of routers weigh in a backward pass what the loss of the tokens does; before each forward pass.

    Megatron-Core's schedules do the same (forward_step_calc_loss), but only where the language model has experts.
    """
    scale = torch.ones(1, device=platform.device())
    if config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale)
    MoEAuxLossAutoScaler.set_loss_scale(scale * (parallel.context_parallel_size() / num_microbatches))
