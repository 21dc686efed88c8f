"""Training without fp32 main parameters: what Adam steps is rounded to the 16 bits that the model computes with.

Numbers alone: after each update the optimizer's fp32 copy is rounded, so an update smaller than half a step of bf16 (2^-9 of
the weight) is lost, as it is where no such copy exists; with stochastic rounding it is kept with the probability that makes the
mean right (arXiv 2010.06192). The memory of the copy is not saved, and moments stay in fp32. Megatron-Core's own
`use_precision_aware_optimizer` needs Transformer Engine. Routers are fp32 in any case.
"""

from functools import partial

import torch

from megatron_moellava.config import RunConfig

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# Odd constants of splitmix64 (Steele et al. 2014), as signed 64-bit numbers.
_STRIDE, _MIX = -7046029254386353131, -4658895280553007687
_LOW = 0xFFFF  # the 16 bits of an fp32 number that bf16 lacks


def round_main_params(run: RunConfig, optimizers: list[DistributedOptimizer]) -> None:
    """Round after every update from now on, where the run asks for it."""
    if run.optimizer.main_params_dtype == "fp32":
        return
    for item in optimizers:
        item.optimizer.register_step_post_hook(partial(_after_step, item, run))


def _after_step(item: DistributedOptimizer, run: RunConfig, *_) -> None:
    key = run.training.seed * 1_000_003 + steps_done(item)
    for models, mains in zip(item.model_float16_groups, item.shard_fp32_from_float16_groups, strict=True):
        for model, main in zip(models, mains, strict=True):
            if run.optimizer.stochastic_rounding:
                place = item._get_model_param_range_map(model)["param"]
                main.copy_(rounded_stochastically(main, place.start, key))
            else:
                main.copy_(main.to(torch.bfloat16))


def steps_done(item: DistributedOptimizer) -> int:
    """Updates so far: torch's Adam counts them for each parameter, Transformer Engine's for each group."""
    adam = item.optimizer
    counts = [int(state["step"]) for state in list(adam.state.values())[:1] if "step" in state]
    return max([*counts, *(int(group["step"]) for group in adam.param_groups if "step" in group)], default=0)


def rounded_stochastically(values: torch.Tensor, start: int, key: int) -> torch.Tensor:
    """fp32 values that bf16 has, each up or down with a probability that makes its mean the value.

    The random bits depend on `key` and on the place of an element in its parameter (`start`: of the first), so that copies of
    a parameter on several ranks stay equal, however it is divided among data-parallel ranks.
    """
    places = torch.arange(start, start + values.numel(), device=values.device, dtype=torch.int64)
    mixed = (places + key) * _STRIDE
    mixed = (mixed ^ (mixed >> 31)) * _MIX
    noise = ((mixed ^ (mixed >> 29)) >> 24) & _LOW
    bits = values.contiguous().view(torch.int32)
    return ((bits + noise.to(torch.int32).view_as(bits)) & ~_LOW).view(torch.float32)
