"""What a person asks of `convert upcycle`, and whether the checkpoint can become that."""

from dataclasses import replace
from pathlib import Path

from megatron_moellava.backbones import Backbone
from megatron_moellava.backbones.experts import mixture_of
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import ConfigError, MoEConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.costs.shapes import Model, expert_ffn_hidden_size, model_from_json


def request(
    checkpoint: Path,
    *,
    num_experts: int,
    topk: int | None,
    placement: list[str] | None,
    residual: bool,
    expert_bias: bool = False,
    shared_expert: bool = False,
    granularity: int = 1,
    expert_width: int | None = None,
    normalize_top1: bool = False,
) -> MoEConfig:
    """The MoE that a person asked for; what was left out is the checkpoint's own, or the recipes' (top-2, sparse).

    With a `granularity`, `num_experts` and `topk` count copies of the MLP, each of which is so many experts. `expert_width`
    says the same by the width of an expert, and both then count experts.
    An expert bias needs Megatron-Core's router, so it takes the place of the original's; so does `normalize_top1`.
    Raises ConfigError for a placement that is neither, and a granularity that the checkpoint cannot have.
    """
    model = model_from_json(read_description(require_checkpoint(checkpoint)).model)
    old = model.moe
    start = old or MoEConfig()
    where = _place("--placement", placement) if placement else start.placement
    if expert_bias:
        start = replace(start, moe_router_enable_expert_bias=True, router="megatron")
    if normalize_top1:
        start = replace(start, normalize_top1=True, router="megatron")
    if granularity != 1 and expert_width is not None:
        raise ConfigError("--granularity and --moe-ffn-hidden-size say the same thing; give one of them")
    if expert_width is not None and expert_width != model.backbone.ffn_hidden_size:
        start = replace(start, moe_ffn_hidden_size=expert_width)
    if granularity != 1:
        start = replace(start, moe_ffn_hidden_size=_divided(model, granularity))
    if shared_expert and not start.moe_shared_expert_intermediate_size:
        start = replace(start, moe_shared_expert_intermediate_size=_shared_size(old, model.backbone))
    return replace(
        start,
        num_moe_experts=num_experts * granularity,
        moe_router_topk=(topk or start.moe_router_topk) * granularity,
        placement=where,  # type: ignore[arg-type]  # other names are refused where it is resolved
        use_residual=residual or bool(old and old.use_residual),
    )


def vision_request(
    *,
    tower_experts: int | None,
    tower_topk: int | None,
    tower_placement: list[str] | None,
    projector_experts: int | None,
    projector_topk: int | None,
    normalize_top1: bool = False,
) -> dict:
    """{"tower_moe": ..., "projector_moe": ...}, those of them that a person asked for; what was left out is CuMo's.

    Raises ConfigError for what describes experts that were not asked for, and for a placement that is none.
    """
    idle = {"--tower-topk": tower_topk, "--tower-placement": tower_placement} if not tower_experts else {}
    idle |= {"--projector-topk": projector_topk} if not projector_experts else {}
    for option, value in idle.items():
        if value:
            part = option.split("-")[2]
            raise ConfigError(f"{option} describes experts that nobody asked for; give --{part}-experts as well")
    found: dict = {}
    if tower_experts:
        options: dict = {"placement": _place("--tower-placement", tower_placement)} if tower_placement else {}
        found["tower_moe"] = TowerMoEConfig(**options, **_numbers(tower_experts, tower_topk, normalize_top1))
    if projector_experts:
        found["projector_moe"] = ProjectorMoEConfig(**_numbers(projector_experts, projector_topk, normalize_top1))
    return found


def _numbers(num_experts: int, topk: int | None, normalize_top1: bool) -> dict:
    topk = topk or ProjectorMoEConfig().moe_router_topk
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": topk,
        "normalize_top1": normalize_top1 and topk == 1,
    }


def _place(option: str, placement: list[str]) -> str | tuple[int, ...]:
    """A placement by name, or layer numbers."""
    numbers = all(part.isdigit() for part in placement)
    if len(placement) > 1 and not numbers:
        raise ConfigError(f"{option} {' '.join(placement)}: one name, or layer numbers such as 0 2 4")
    return tuple(map(int, placement)) if numbers else placement[0]


def _shared_size(old: MoEConfig | None, backbone: Backbone) -> int:
    """Of a new shared expert: it is a copy of the dense MLP, or of the first of the experts that are there."""
    return expert_ffn_hidden_size(old, backbone) if old else backbone.ffn_hidden_size


def _divided(model: Model, granularity: int) -> int:
    """The width of an expert."""
    width = model.backbone.ffn_hidden_size
    if model.moe is not None:
        raise ConfigError(
            f"--granularity {granularity}: the checkpoint has experts already, whose width stays; upcycle a dense one"
        )
    if granularity < 1 or width % granularity:
        raise ConfigError(
            f"--granularity {granularity} does not divide ffn_hidden_size={width} ({model.backbone.name}); use a power of two "
            "that does"
        )
    return width // granularity


def check_request(there: Model, asked: Model) -> None:
    """ConfigError where `asked` cannot be made of `there`."""
    _check_vision(there, asked)
    if asked.moe is None:
        return
    old, new, layers = there.moe, asked.moe, asked.moe_layers
    if not 1 <= new.moe_router_topk <= new.num_moe_experts:
        raise ConfigError(
            f"moe_router_topk={new.moe_router_topk} must be between 1 and num_moe_experts={new.num_moe_experts}"
        )
    backbone, shared = there.backbone, new.moe_shared_expert_intermediate_size
    if shared and backbone.add_bias_linear:
        raise ConfigError(f"shared expert: the MLPs of {backbone.name} have biases, which Megatron-Core's cannot have")
    size = _shared_size(old, backbone)
    if shared not in (None, old and old.moe_shared_expert_intermediate_size, size):
        raise ConfigError(
            f"moe_shared_expert_intermediate_size={shared}: a shared expert starts as a copy of an MLP, so its size is {size}"
        )
    _check_division(old, new, backbone)
    if old is None:
        return
    _check_own(there, asked)
    if there.moe_layers != layers:
        raise ConfigError(
            f"placement={list(layers)}, but the checkpoint has experts in layers {list(there.moe_layers)}; "
            "leave --placement out"
        )
    if new.use_residual != old.use_residual:
        raise ConfigError(f"use_residual={new.use_residual}, but the checkpoint has {old.use_residual}")
    if new.num_moe_experts < old.num_moe_experts:
        raise ConfigError(
            f"num_moe_experts={new.num_moe_experts}, but the checkpoint has {old.num_moe_experts}; experts only grow"
        )


def _check_vision(there: Model, asked: Model) -> None:
    """The experts of the tower and the projector are made once."""
    if asked.moe is None and asked == there:
        raise ConfigError("no experts were asked for; give --num-experts, --tower-experts or --projector-experts")
    for component in ("tower", "projector"):
        section = f"{component}_moe"
        old, new = getattr(there, section), getattr(asked, section)
        if new is None:
            continue
        if there.tower is None:
            raise ConfigError(f"--{component}-experts: the checkpoint is a language model alone")
        if not 1 <= new.moe_router_topk <= new.num_moe_experts:
            raise ConfigError(
                f"--{component}-topk {new.moe_router_topk} must be between 1 and --{component}-experts {new.num_moe_experts}"
            )
        if old is not None and old != new:
            raise ConfigError(
                f"--{component}-experts: the checkpoint's {component} has {old.num_moe_experts} experts already, and they "
                "stay; leave it out"
            )
    _ = asked.tower_moe_layers  # says what is wrong with a placement


def _check_own(there: Model, asked: Model) -> None:
    """Experts that the backbone's family has may grow in number, and stay what they are otherwise."""
    if there.backbone.moe is None:
        return
    own, new = (mixture_of(model.required_moe, there.backbone) for model in (there, asked))
    grows = own["num_moe_experts"] != new["num_moe_experts"]
    for name, value in own.items():
        if new[name] != value and name not in ("num_moe_experts", "moe_router_topk"):
            raise ConfigError(
                f"{name}={new[name]}: {there.backbone.name} has experts of its own, with {value}; leave it out"
            )
    if grows and own["moe_router_num_groups"]:
        raise ConfigError(
            f"{there.backbone.name} chooses among {own['moe_router_num_groups']} groups of its experts, which more experts "
            "would mix up; it cannot grow"
        )


def _check_division(old: MoEConfig | None, new: MoEConfig, backbone: Backbone) -> None:
    """Whether experts of the width asked for can be cut out of what there is."""
    width, inner = expert_ffn_hidden_size(new, backbone), backbone.ffn_hidden_size
    if old is not None:
        if width != (there := expert_ffn_hidden_size(old, backbone)):
            raise ConfigError(
                f"moe_ffn_hidden_size={width}, but the checkpoint's experts are {there} wide; leave it out"
            )
        return
    if width < 1 or inner % width:
        raise ConfigError(f"moe_ffn_hidden_size={width} does not divide ffn_hidden_size={inner} ({backbone.name})")
    granularity = inner // width
    for name in ("num_moe_experts", "moe_router_topk"):
        if getattr(new, name) % granularity:
            raise ConfigError(
                f"{name}={getattr(new, name)} must be a multiple of {granularity}: with moe_ffn_hidden_size={width} a copy of "
                f"the MLP ({inner}) is {granularity} experts, which are chosen together"
            )
