"""Dense -> MoE (stage 3's start), and MoE -> MoE with more experts. A Megatron checkpoint in, a Megatron checkpoint out.

Dense: the MLP of each chosen layer is copied into every expert, bit by bit (or with noise), and a new router is drawn;
residual MoE keeps the MLP beside them. With equal experts the function does not change: the weights of the chosen
experts sum to 1. More experts: the old ones are repeated in their order, and so are their router rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_moellava.checkpoint.description import read_description, trained_with
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.initial import language_dtype, linear_default, noise, zeros
from megatron_moellava.conversion.layout import MLP
from megatron_moellava.conversion.megatron_checkpoint import (
    Checkpoint,
    check_complete,
    open_checkpoint,
    write_checkpoint,
)
from megatron_moellava.conversion.recipes import Edit, Part, Recipe, check, identity
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.shapes import EXPERTS, RESIDUAL, SHARED_EXPERTS, UNUSED, megatron_tensors, model_from_json
from megatron_moellava.mapping import Shape

CARRIED = ("hf_config", "generation_config", "trained_with")  # stand in the new provenance themselves
ROUTER, EXPERT_BIAS = "router.weight", "router.expert_bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycling:
    """What every new tensor is made from."""

    tensors: dict[str, Tensor]  # the checkpoint's; new ones are added
    hidden_size: int
    old_experts: int  # 0: the checkpoint is dense
    halves: bool  # a shared expert beside copies of the same MLP: each has half of its output
    repeats_router: bool  # else new experts get new router rows
    noise_std: float
    router_scale: float
    seed: int


def upcycle_checkpoint(
    checkpoint: Path,
    *,
    save: Path,
    moe: MoEConfig,
    noise_std: float = 0.0,
    router_scale: float = 1.0,
    seed: int = 0,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Write the MoE model `moe` that starts from `checkpoint` to SAVE/iter_0000000.

    `noise_std`: noise on the copies of the experts, relative to the spread of the weights; expert 0 stays exact.
    `router_scale`: new router weights relative to torch's default range, which the original uses; 0 starts undecided.
    `seed`: of the noise, the router and the coefficient. A MoE checkpoint keeps its layers and its residual MLP.
    `verify`: False uses the checkpoint without comparing digests, and leaves a note of that in the provenance.
    Raises ConfigError for a negative router_scale.
    """
    source = open_checkpoint(checkpoint, verify=verify)
    model = replace(source.model, moe=moe)
    old = source.model.moe
    _check_request(source, moe, model.moe_layers)
    if router_scale < 0:
        raise ConfigError(
            f"router_scale={router_scale} must not be negative; 1 is the original's, 0 makes all weights zero"
        )
    check_complete(source)
    job = Upcycling(
        tensors=dict(source.tensors),
        hidden_size=model.backbone.hidden_size,
        old_experts=old.num_moe_experts if old else 0,
        halves=old is None and bool(moe.moe_shared_expert_intermediate_size),
        repeats_router=bool(old)
        and moe.num_moe_experts * old.moe_router_topk == old.num_moe_experts * moe.moe_router_topk,
        noise_std=noise_std,
        router_scale=router_scale,
        seed=seed,
    )
    recipes = [
        identity(name, source.tensors[name])
        if name in source.tensors and source.tensors[name].shape == shape
        else _made(name, shape, job)
        for name, shape in megatron_tensors(model).items()
    ]
    recipes += [identity(name, tensor) for name, tensor in source.tensors.items() if name.startswith(UNUSED)]
    tensors = job.tensors
    check(recipes, tensors, what=str(source.folder), copies=True)
    earlier = source.run.provenance
    provenance = {
        "operation": "upcycle" if old is None else "grow",
        "source": source.folder.name,
        "noise_std": noise_std,
        "router_scale": router_scale,
        "seed": seed,
        "hf_config": earlier.get("hf_config"),
        "generation_config": earlier.get("generation_config"),
        "trained_with": trained_with(source.run),
        "parent": {key: value for key, value in earlier.items() if key not in CARRIED},
    } | ({} if source.verified else {"source_verified": False})
    begin(sum(recipe.nbytes for recipe in recipes))
    folder = write_checkpoint(
        save,
        model,
        recipes,
        tensors,
        stage=2 if source.run.stage is None else source.run.stage,
        provenance=provenance,
        progress=progress,
    )
    return {"folder": str(folder), "model": model, "tensors": len(recipes), **provenance}


def request(
    checkpoint: Path,
    *,
    num_experts: int,
    topk: int | None,
    placement: list[str] | None,
    residual: bool,
    expert_bias: bool = False,
    shared_expert: bool = False,
) -> MoEConfig:
    """The MoE that a person asked for; what was left out is the checkpoint's own, or the recipes' (top-2, sparse).

    An expert bias needs Megatron-Core's router, so it takes the place of the original's.
    Raises ConfigError for a placement that is neither.
    """
    model = model_from_json(read_description(require_checkpoint(checkpoint)).model)
    old = model.moe
    start = old or MoEConfig()
    where: str | tuple[int, ...] = start.placement
    if placement:
        numbers = all(part.isdigit() for part in placement)
        if len(placement) > 1 and not numbers:
            raise ConfigError(f"--placement {' '.join(placement)}: one name, or layer numbers such as 0 2 4")
        where = tuple(map(int, placement)) if numbers else placement[0]
    if expert_bias:
        start = replace(start, moe_router_enable_expert_bias=True, router="megatron")
    if shared_expert and not start.moe_shared_expert_intermediate_size:
        start = replace(start, moe_shared_expert_intermediate_size=model.backbone.ffn_hidden_size)
    return replace(
        start,
        num_moe_experts=num_experts,
        moe_router_topk=topk or start.moe_router_topk,
        placement=where,
        use_residual=residual or bool(old and old.use_residual),
    )


def _check_request(source: Checkpoint, new: MoEConfig, layers: tuple[int, ...]) -> None:
    old = source.model.moe
    if not 1 <= new.moe_router_topk <= new.num_moe_experts:
        raise ConfigError(
            f"moe_router_topk={new.moe_router_topk} must be between 1 and num_moe_experts={new.num_moe_experts}"
        )
    backbone, shared = source.model.backbone, new.moe_shared_expert_intermediate_size
    if shared and backbone.add_bias_linear:
        raise ConfigError(f"shared expert: the MLPs of {backbone.name} have biases, which Megatron-Core's cannot have")
    if shared not in (None, old and old.moe_shared_expert_intermediate_size, backbone.ffn_hidden_size):
        raise ConfigError(
            f"moe_shared_expert_intermediate_size={shared}: a shared expert starts as a copy of an MLP, so its size is "
            f"{backbone.ffn_hidden_size}"
        )
    if old is None:
        return
    if source.model.moe_layers != layers:
        raise ConfigError(
            f"placement={list(layers)}, but the checkpoint has experts in layers {list(source.model.moe_layers)}; "
            "leave --placement out"
        )
    if new.use_residual != old.use_residual:
        raise ConfigError(f"use_residual={new.use_residual}, but the checkpoint has {old.use_residual}")
    if new.num_moe_experts < old.num_moe_experts:
        raise ConfigError(
            f"num_moe_experts={new.num_moe_experts}, but the checkpoint has {old.num_moe_experts}; experts only grow"
        )


def _made(name: str, shape: Shape, job: "Upcycling") -> Recipe:
    """A tensor that the checkpoint lacks, or has with fewer experts."""
    layer, _, tail = name.partition(MLP)
    if tail.startswith(EXPERTS):
        dense = name if job.old_experts else f"{layer}{MLP}{tail.removeprefix(EXPERTS)}"
        return _copies(name, shape, dense, max(job.old_experts, 1), job)
    if tail.startswith(RESIDUAL):
        dense = f"{layer}{MLP}{tail.removeprefix(RESIDUAL)}"
        return identity(dense, job.tensors[dense], name)
    if tail.startswith(SHARED_EXPERTS):
        return _shared(name, shape, f"{layer}{MLP}", tail.removeprefix(SHARED_EXPERTS), job)
    if tail == EXPERT_BIAS:
        return _new(name, zeros(shape, "float32"), job)
    if tail == ROUTER and job.old_experts:
        return _copies(name, shape, name, job.old_experts, job) if job.repeats_router else _longer(name, shape, job)
    dtype = "float32" if tail == ROUTER else language_dtype(job.tensors)
    scale = job.router_scale if tail == ROUTER else 1.0
    return _new(name, linear_default(name, shape, job.hidden_size, dtype, job.seed, scale), job)


def _shared(name: str, shape: Shape, mlp: str, part: str, job: "Upcycling") -> Recipe:
    """A shared expert. The function stays: beside copies of the MLP each of the two halves its output (a power of two is
    exact); beside trained experts it has the first one's inner weights, and an output of zero."""
    if job.old_experts and part.startswith("linear_fc2"):
        return _new(name, zeros(shape, job.tensors[f"{mlp}{EXPERTS}{part}"].dtype), job)
    source = f"{mlp}{EXPERTS}{part}" if job.old_experts else f"{mlp}{part}"
    edit = _half if part.startswith("linear_fc2") else None
    return Recipe(name, shape, job.tensors[source].dtype, (Part(source, 0, math.prod(shape), edit),))


def _half(block):
    return block * 0.5


def _copies(name: str, shape: Shape, source: str, experts: int, job: "Upcycling") -> Recipe:
    """`shape[0]` slices from the `experts` slices of `source`, in turn. The first round is exact, the rest has noise."""
    tensor = job.tensors[source]
    size = tensor.numel // experts
    parts = []
    for number in range(shape[0]):
        noisy = job.noise_std and number >= experts and EXPERTS in name
        edit = noise(f"{name} {number}", job.noise_std, job.seed) if noisy else None
        if job.halves and f"{EXPERTS}linear_fc2" in name:
            edit = _then(_half, edit)
        parts.append(Part(source, number % experts * size, size, edit))
    return Recipe(name, shape, tensor.dtype, tuple(parts))


def _then(first: Edit, second: Edit | None) -> Edit:
    return first if second is None else lambda block: second(first(block))


def _longer(name: str, shape: Shape, job: "Upcycling") -> Recipe:
    """The router's old rows and new ones below them."""
    old = job.tensors[name]
    added = (shape[0] - old.shape[0], shape[1])
    extra = f"{name} (new rows)"
    job.tensors[extra] = linear_default(extra, added, job.hidden_size, old.dtype, job.seed, job.router_scale)
    return Recipe(name, shape, old.dtype, (Part(name, 0, old.numel), Part(extra, 0, added[0] * added[1])))


def _new(name: str, tensor: Tensor, job: "Upcycling") -> Recipe:
    job.tensors[name] = tensor
    return identity(name, tensor)
