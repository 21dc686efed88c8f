"""The experts of the vision tower and of the projector: their numbers, and how they are divided over processes."""

from collections.abc import Iterator

from megatron_moellava.config import MoELlavaError, RunConfig
from megatron_moellava.placement import moe_layers
from megatron_moellava.stages import adapted_roles
from megatron_moellava.towers import Tower
from megatron_moellava.validation.layout import divisors


def vision_expert_problems(run: RunConfig) -> Iterator[str]:
    """What they need of the layout and of each other's settings."""
    parallel = run.parallel
    ranks, split = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or 1
    for component, moe in run.mixtures.items():
        if component == "language":
            continue
        section = f"{component}_moe"
        if apart := [modality.name for modality in run.data.modalities if modality.is_apart]:
            yield (
                f"{section} with {', '.join(apart)} in data.modalities: experts of tower and projector beside towers or "
                "projectors of a modality's own are not supported; leave one of them out"
            )
        if moe.num_moe_experts < 1:  # which validation/numbers.py says
            continue
        if moe.num_moe_experts % ranks:
            yield (
                f"parallel.expert_model_parallel_size={ranks} does not divide {section}.num_moe_experts="
                f"{moe.num_moe_experts}; use {divisors(moe.num_moe_experts)}"
            )
        if not 1 <= moe.moe_router_topk <= moe.num_moe_experts:
            yield (
                f"{section}.moe_router_topk={moe.moe_router_topk} must lie between 1 and {section}.num_moe_experts="
                f"{moe.num_moe_experts}"
            )
        if moe.normalize_top1 and moe.moe_router_topk > 1:
            yield (
                f"{section}.normalize_top1=true with {section}.moe_router_topk={moe.moe_router_topk}: the weights of several "
                "experts sum to 1 anyway; leave it unset"
            )
        if split > 1:
            yield (
                f"parallel.expert_tensor_parallel_size={split}: the experts of {section} have biases, which Megatron-Core "
                "cannot split; use 1"
            )
        if parallel.sequence_parallel is False and parallel.tensor_model_parallel_size > 1:
            yield (
                f"parallel.sequence_parallel=false with {section}: its tensor-parallel ranks divide the tokens, and gradients "
                "of routers are added up only with sequence parallelism; leave it unset"
            )
        if component in adapted_roles(run.training.lora):
            yield (
                f"training.lora.targets has {component}, whose experts ({section}) get no adapters; leave it out, or train it "
                f"whole (training.trains)"
            )
        if run.optimizer.optimizer == "muon":
            yield f"optimizer.optimizer=muon with {section} has not been tried; use adam"


def tower_expert_problems(run: RunConfig, tower: Tower) -> Iterator[str]:
    """Whether the tower has the layers that are to have experts."""
    if run.tower_moe is None:
        return
    try:
        moe_layers(run.tower_moe.placement, tower.num_used_layers, "tower_moe.placement")
    except MoELlavaError as error:
        yield f"{error} ({tower.name})"
