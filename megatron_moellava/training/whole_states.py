"""Checkpoints of an optimizer whose ranks hold whole parameters (`muon.py`), in the form of all others: a tensor
`optimizer.state.KIND.WEIGHT` for the main parameter and each moment, which any layout loads."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from megatron_moellava.checkpoint.folders import OPTIMIZER_STATE

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

type Sharded = ShardedTensor | ShardedTensorFactory


def of_weight(weight: Sharded, key: str, data: torch.Tensor) -> Sharded:
    """One fp32 tensor of a weight's state, split over the ranks as the weight is."""
    changes: dict = {"key": f"{OPTIMIZER_STATE}{key}.{weight.key}", "data": data}
    if isinstance(weight, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(weight, **changes)


def whole_states(
    optimizer: LayerWiseDistributedOptimizer, model_state: dict, make: Callable = lambda data: data
) -> dict:
    """{number of the optimizer: {number of the parameter: {kind: sharded tensor}}} of what this rank steps.

    `make`: what a tensor becomes; for a request, an empty one.
    """
    weights = {sharded.data: sharded for sharded in model_state.values()}
    state: dict[int, dict] = {}
    for index, parts in enumerate(_tensors(optimizer)):
        state[index] = {
            number: {key: _owned(of_weight(weights[model], key, make(value))) for key, value in tensors.items()}
            for number, (model, tensors) in enumerate(parts)
        }
    return state


def init_moments(item) -> None:
    """Moments of an optimizer that has not stepped yet. Torch's AdamW takes them for those of a step, which it counts."""
    item.init_state_fn(item.optimizer)
    if isinstance(item.optimizer, torch.optim.AdamW):
        for moments in item.optimizer.state.values():
            moments.setdefault("step", torch.tensor(0.0))


@torch.no_grad()
def load_whole_states(optimizer: LayerWiseDistributedOptimizer, loaded: dict, steps: int) -> None:
    """Fill main parameters and moments with what a request of `whole_states` has brought, and count the updates."""
    for index, parts in enumerate(_tensors(optimizer)):
        for number, (_, tensors) in enumerate(parts):
            for key, value in tensors.items():
                value.copy_(loaded[index][number][key])
    for item in optimizer.chained_optimizers:
        if isinstance(item.optimizer, torch.optim.AdamW):
            for moments in item.optimizer.state.values():
                moments["step"] = torch.tensor(float(steps))
        else:  # Muon's and FusedAdam's count is the group's
            for group in item.optimizer.param_groups:
                group["step"] = steps


def _tensors(optimizer: LayerWiseDistributedOptimizer) -> Iterator[list[tuple[torch.Tensor, dict[str, torch.Tensor]]]]:
    """Of each optimizer: (weight of the model, {kind: tensor}) of every parameter that this rank steps."""
    for item in optimizer.chained_optimizers:
        init_moments(item)
        weight_of = {id(main): weight for weight, main in _copies(item)}
        yield [
            (weight_of.get(id(main), main), {"param": main.detach(), **_moments(item.optimizer.state[main])})
            for group in item.optimizer.param_groups
            for main in group["params"]
        ]


def _copies(item) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, its fp32 copy) of the optimizer of a bf16 model."""
    for weights, mains in zip(
        getattr(item, "float16_groups", ()), getattr(item, "fp32_from_float16_groups", ()), strict=True
    ):
        yield from zip(weights, mains, strict=True)


def _moments(state: dict) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}


def _owned(sharded: Sharded) -> Sharded:
    """No other data-parallel rank has it: this one writes it, whatever number it has among them."""
    rank = sharded.replica_id
    return replace(sharded, replica_id=0 if isinstance(rank, int) else (*rank[:-1], 0))
