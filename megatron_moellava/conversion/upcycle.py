"""Dense -> MoE (stage 3's start), and MoE -> MoE with more experts. A Megatron checkpoint in, a Megatron checkpoint out.

Dense: the MLP of each chosen layer is copied into every expert, bit by bit (or with noise, in parts, with columns drawn anew:
`expert_parts.py`), and a new router is drawn; residual MoE keeps the MLP beside them. With equal experts the function does
not change: the weights of the chosen experts sum to 1 (one expert alone: with `normalize_top1`). More experts: the old ones
are repeated in their order, and so are their router rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_moellava.checkpoint.description import converted
from megatron_moellava.config import ConfigError, MoEConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.conversion.expert_parts import FC2, Division, expert_parts
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
from megatron_moellava.conversion.upcycle_request import check_request
from megatron_moellava.conversion.utility import sources_by_utility
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.shapes import (
    EXPERTS,
    PROJECTOR,
    RESIDUAL,
    SHARED_EXPERTS,
    TOWER,
    UNUSED,
    expert_ffn_hidden_size,
    megatron_tensors,
)
from megatron_moellava.mapping import Shape

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
    division: Division  # of an MLP into experts
    sources: dict[int, list[int]]  # layer -> the old expert that each is made of; empty: all in turn


def upcycle_checkpoint(
    checkpoint: Path,
    *,
    save: Path,
    moe: MoEConfig | None,
    tower_moe: TowerMoEConfig | None = None,
    projector_moe: ProjectorMoEConfig | None = None,
    noise_std: float = 0.0,
    router_scale: float = 1.0,
    drop: float = 0.0,
    select: str = "",
    seed: int = 0,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Write the MoE model `moe` that starts from `checkpoint` to SAVE/iter_0000000.

    `tower_moe`, `projector_moe`: experts of the tower and the projector, likewise copies of what they replace, with routers
    drawn anew. None, also for `moe`: that part stays what it is.

    With `moe.moe_ffn_hidden_size` a copy of an MLP becomes several experts: the MLP's width divided by it is the granularity.

    `noise_std`: noise on the copies of the experts, relative to the spread of the weights; expert 0 stays exact.
    `router_scale`: new router weights relative to torch's default range, which the original uses; 0 starts undecided.
    `drop`: share of each new expert's inner columns that is drawn anew (0.5 in arXiv 2502.19261).
    `select`: "utility" copies the experts of a MoE checkpoint with the largest gradients (`utility.py`), not all in turn.
    `seed`: of the noise, the columns, the router and the coefficient. A MoE checkpoint keeps its layers and its residual MLP.
    `verify`: False uses the checkpoint without comparing digests, and leaves a note of that in the provenance.
    Raises ConfigError for a negative router_scale, a drop that is no share, and sizes that do not divide each other.
    """
    source = open_checkpoint(checkpoint, verify=verify)
    old, asked = source.model.moe, moe
    moe = moe or old
    vision = {"tower_moe": tower_moe, "projector_moe": projector_moe}
    asked_for: dict = {name: fields for name, fields in vision.items() if fields}
    model = replace(source.model, moe=moe, **asked_for)
    check_request(source.model, model)
    if router_scale < 0:
        raise ConfigError(
            f"router_scale={router_scale} must not be negative; 1 is the original's, 0 makes all weights zero"
        )
    if not 0 <= drop <= 1:
        raise ConfigError(f"drop={drop} must lie between 0 and 1; 0.5 is Drop-Upcycling's")
    check_complete(source)
    kind, sources = _selected(source, asked, select) if asked else ("", {})
    inner = expert_ffn_hidden_size(old, model.backbone) if old else model.backbone.ffn_hidden_size
    division = Division(
        inner=inner,
        gated=model.backbone.gated_linear_unit,
        granularity=inner // expert_ffn_hidden_size(moe, model.backbone) if moe else 1,
        drop=drop,
        seed=seed,
    )
    job = Upcycling(
        tensors=dict(source.tensors),
        hidden_size=model.backbone.hidden_size,
        old_experts=old.num_moe_experts if old else 0,
        halves=old is None and moe is not None and bool(moe.moe_shared_expert_intermediate_size),
        repeats_router=old is not None
        and moe is not None
        and moe.num_moe_experts * old.moe_router_topk == old.num_moe_experts * moe.moe_router_topk,
        noise_std=noise_std,
        router_scale=router_scale,
        seed=seed,
        division=division,
        sources=sources,
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
    provenance = converted(
        source.run,
        "grow" if old is not None and asked is not None else "upcycle",
        source=source.folder.name,
        noise_std=noise_std,
        router_scale=router_scale,
        seed=seed,
    )
    provenance |= {"granularity": division.granularity} if division.granularity > 1 else {}
    provenance |= {"drop": drop} if drop else {}
    named = {str(layer): numbers for layer, numbers in sources.items()}
    provenance |= {"select": select, "utility": kind, "sources": named} if select else {}
    provenance |= {} if source.verified else {"source_verified": False}
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


def _made(name: str, shape: Shape, job: "Upcycling") -> Recipe:
    """A tensor that the checkpoint lacks, or has with fewer experts."""
    if name.startswith((TOWER, PROJECTOR)):
        return _of_vision(name, shape, job)
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
        return _biases(name, shape, job)
    if tail == ROUTER and job.old_experts:
        return _copies(name, shape, name, job.old_experts, job) if job.repeats_router else _longer(name, shape, job)
    dtype = "float32" if tail == ROUTER else language_dtype(job.tensors)
    scale = job.router_scale if tail == ROUTER else 1.0
    if tail == ROUTER and job.division.granularity > 1:
        return _repeated_rows(name, shape, job)
    return _new(name, linear_default(name, shape, job.hidden_size, dtype, job.seed, scale), job)


def _of_vision(name: str, shape: Shape, job: "Upcycling") -> Recipe:
    """Of the experts of the tower or the projector: a router drawn anew, and copies of the one MLP that there is."""
    if name.endswith(ROUTER):
        return _new(name, linear_default(name, shape, shape[1], "float32", job.seed, job.router_scale), job)
    whole = replace(job.division, granularity=1, drop=0.0)
    return _copies(name, shape, name.replace(EXPERTS, "", 1), 1, replace(job, division=whole, halves=False, sources={}))


def _biases(name: str, shape: Shape, job: "Upcycling") -> Recipe:
    """Those of old experts go on; new ones start with none, or with those of the experts whose router rows they repeat."""
    if name not in job.tensors:
        return _new(name, zeros(shape, "float32"), job)
    old = job.tensors[name]
    if job.repeats_router:
        return _copies(name, shape, name, job.old_experts, job)
    extra = f"{name} (of new experts)"
    job.tensors[extra] = zeros((shape[0] - old.numel,), old.dtype)
    return Recipe(name, shape, old.dtype, (Part(name, 0, old.numel), Part(extra, 0, shape[0] - old.numel)))


def _repeated_rows(name: str, shape: Shape, job: "Upcycling") -> Recipe:
    """A new router's rows, those of a granularity of 1, each for all parts of a copy: the parts are chosen together."""
    copies, hidden = shape[0] // job.division.granularity, shape[1]
    rows = f"{name} (a row for each copy)"
    job.tensors[rows] = linear_default(name, (copies, hidden), job.hidden_size, "float32", job.seed, job.router_scale)
    parts = (Part(rows, copy * hidden, hidden) for copy in range(copies) for _ in range(job.division.granularity))
    return Recipe(name, shape, "float32", tuple(parts))


def _shared(name: str, shape: Shape, mlp: str, part: str, job: "Upcycling") -> Recipe:
    """A shared expert. The function stays: beside copies of the MLP each of the two halves its output (a power of two is
    exact); beside trained experts it has the first one's inner weights, and an output of zero."""
    if job.old_experts and part.startswith("linear_fc2"):
        return _new(name, zeros(shape, job.tensors[f"{mlp}{EXPERTS}{part}"].dtype), job)
    source = f"{mlp}{EXPERTS}{part}" if job.old_experts else f"{mlp}{part}"
    edit = partial(_times, 0.5) if part.startswith("linear_fc2") else None
    return Recipe(name, shape, job.tensors[source].dtype, (Part(source, 0, math.prod(shape), edit),))


def _copies(name: str, shape: Shape, source: str, experts: int, job: "Upcycling") -> Recipe:
    """`shape[0]` slices from the `experts` slices of `source`, in turn. The first round is exact, the rest has noise."""
    tensor = job.tensors[source]
    size = tensor.numel // experts
    parts: list[Part] = []
    for number in range(shape[0]):
        base, is_copy = _source_of(name, number, experts, job) * size, number >= experts
        noisy = job.noise_std and is_copy and EXPERTS in name
        edit = noise(f"{name} {number}", job.noise_std, job.seed) if noisy else None
        scale = _output_scale(name, job)
        if scale != 1:
            edit = _then(partial(_times, scale), edit)
        redraws = is_copy or not job.old_experts
        if job.division.is_plain or EXPERTS not in name or not redraws:
            parts.append(Part(source, base, size, edit))
            continue
        made = expert_parts(name, number, source, tensor, base, size, job.division)
        parts += [replace(part, edit=_then(part.edit, edit)) for part in made]
    return Recipe(name, shape, tensor.dtype, tuple(parts))


def _source_of(name: str, number: int, experts: int, job: "Upcycling") -> int:
    """The old expert that a new one is made of; a dense MLP is the only one."""
    if job.sources and EXPERTS in name:
        return job.sources[int(name.partition("decoder.layers.")[2].partition(".")[0])][number]
    return number // job.division.granularity % experts


def _selected(source: Checkpoint, moe: MoEConfig, select: str) -> tuple[str, dict[int, list[int]]]:
    """What the utility is taken from, and by layer the old expert of each new one; nothing where all are copied in turn."""
    if not select:
        return "", {}
    old = source.model.moe
    if select != "utility":
        raise ConfigError(f"select={select!r} is unknown; the experts to copy are chosen by utility, or all in turn")
    if old is None:
        raise ConfigError(f"--select {select} chooses among the experts of a MoE checkpoint, and this one is dense")
    if moe.num_moe_experts * old.moe_router_topk == old.num_moe_experts * moe.moe_router_topk:
        raise ConfigError(
            f"--select {select}: with num_moe_experts={moe.num_moe_experts} and moe_router_topk={moe.moe_router_topk} every "
            "expert is copied equally often, which keeps the function; leave --select out, or keep the checkpoint's top-k"
        )
    return sources_by_utility(source, moe.num_moe_experts)


def _output_scale(name: str, job: "Upcycling") -> float:
    """What an expert's output matrix is multiplied by, so that the experts chosen sum to the MLP. Powers of two are exact."""
    if f"{EXPERTS}{FC2}" not in name:
        return 1
    parts = job.division.granularity if name.endswith("weight") else 1
    return parts * (0.5 if job.halves else 1)


def _times(scale: float, block):
    return block * scale


def _then(first: Edit | None, second: Edit | None) -> Edit | None:
    if first is None or second is None:
        return first or second
    return lambda block: second(first(block))


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
