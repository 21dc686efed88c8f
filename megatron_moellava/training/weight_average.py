"""An exponential moving average of the weights (EMA), for evaluation: it has no part in the training.

Each data-parallel rank averages the share of the main parameters that its optimizer steps, in fp32 (4 bytes per trained
parameter, shared as Adam's moments are). It lies among the moments, as a third tensor of each parameter, and so goes into
checkpoints and out of them under any layout. Steps that are skipped do not count.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_moellava.checkpoint.folders import AVERAGE
from megatron_moellava.config import OptimizerConfig
from megatron_moellava.training.main_params import steps_done

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class AveragingOptimizer(DistributedOptimizer):
    """Megatron-Core's, which reads, gathers and fills one more tensor of each parameter."""

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Adam's moments, and the average."""
        return (*super().optimizer_state_keys, AVERAGE)


def average_weights(options: OptimizerConfig, optimizers: list[DistributedOptimizer]) -> None:
    """Average after every update from now on, where the run asks for it."""
    if options.ema_decay is None:
        return
    for item in optimizers:
        item.__class__ = AveragingOptimizer
        item.init_state_fn = partial(_with_average, item.init_state_fn)
        item.optimizer.register_step_post_hook(partial(_after_step, item, options.ema_decay))


def decay_of(update: int, decay: float) -> float:
    """What an update keeps of the average: `decay`, and less at the start of a run, where the average would be that of
    the first weights (the rule of TensorFlow's ExponentialMovingAverage)."""
    return min(decay, (1 + update) / (10 + update))


def _with_average(init_state: Callable, adam: torch.optim.Optimizer, *more) -> None:
    """Megatron-Core's initial state of an optimizer, and averages that are the weights."""
    init_state(adam, *more)
    for main in _main_params(adam):
        adam.state[main].setdefault(AVERAGE, main.detach().clone())


def _after_step(item: DistributedOptimizer, decay: float, adam: torch.optim.Optimizer, *_) -> None:
    mains = _main_params(adam)
    new = [main for main in mains if AVERAGE not in adam.state[main]]
    for main in new:
        adam.state[main][AVERAGE] = main.detach().clone()
    if mains and not new:
        averages = [adam.state[main][AVERAGE] for main in mains]
        torch._foreach_lerp_(averages, [main.detach() for main in mains], 1.0 - decay_of(steps_done(item), decay))


def _main_params(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [main for group in adam.param_groups for main in group["params"]]


@contextlib.contextmanager
def averages_in_place(optimizers: list[DistributedOptimizer], wrapped: list[DistributedDataParallel]) -> Iterator[None]:
    """The model has the averages for weights, and afterwards its own again, bit by bit. Collective."""
    kept = []
    for item in optimizers:
        for main in _main_params(item.optimizer):
            kept.append((main, main.detach().clone()))
            main.data.copy_(item.optimizer.state[main].get(AVERAGE, main))
    _into_the_model(optimizers, wrapped)
    try:
        yield
    finally:
        for main, value in kept:
            main.data.copy_(value)
        _into_the_model(optimizers, wrapped)


def _into_the_model(optimizers: list[DistributedOptimizer], wrapped: list[DistributedDataParallel]) -> None:
    for item in optimizers:
        item._copy_main_params_to_model_params()
    for chunk in wrapped:
        chunk.start_param_sync(force_sync=True)
