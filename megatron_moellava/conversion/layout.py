"""Layouts: the naming schemes under which the same model is found outside. `entries` lists, tensor by tensor, how a
Megatron checkpoint and a layout correspond; import and export both read that list.

This is where MLP lines are lifted to experts: at a MoE layer each `mlp.` mapping of the family file stands for one
tensor of all experts, and the layout says how expert number k is spelt.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_moellava.config import ConfigError
from megatron_moellava.costs.shapes import (
    EXPERTS,
    LANGUAGE,
    PROJECTOR,
    RESIDUAL,
    SHARED_EXPERTS,
    SHARED_GATE,
    TOWER,
    Model,
    megatron_tensors,
)
from megatron_moellava.mapping import Heads, Mapping, Shape

NEWLINE = "model.image_newline"  # in a mm_projector.bin
MLP = ".mlp."  # in every family, on both sides, what stands before this is the layer and what follows is the MLP


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """`{decoder}` is the family's prefix of the decoder ("model.", Qwen v1: "transformer."); `{k}` the expert."""

    name: str
    title: str  # for a person
    language: str = ""  # put in front of the language model's names
    moved_decoder: str = ""  # stands in the place of `{decoder}`, and `language` is not put in front
    tower: str = ""  # stands in the place of "vision_model."; empty: the layout has no tower
    projector: tuple[str, str] | None = None  # names of the two linear layers
    newline: str = ""  # of the learned end of a line; empty: the layout puts no tiles together
    expert: str = ""  # put between ".mlp." and the MLP's own names
    router: str = ""
    residual: str = ""
    shared: str = ""
    coefficient: str = ""
    module: str = MLP  # stands in the place of ".mlp." where there are experts
    expert_bias: str = "expert_bias"  # behind the router's
    shared_gate: str = "shared_expert_gate.weight"
    by_family: bool = True  # a family with experts of its own spells them in its own way
    is_published: bool = True  # in files; False: as transformers has them in memory, where all MLPs have one name


LANGUAGE_MODEL = Layout(name="language-model", title="Hugging Face language model")
VISION_TOWER = Layout(name="tower", title="Hugging Face vision tower", tower="vision_model.")
LLAVA = Layout(
    name="llava",
    title="LLaVA-1.5, as released",
    tower="{decoder}vision_tower.vision_tower.vision_model.",
    projector=("{decoder}mm_projector.0", "{decoder}mm_projector.2"),
    newline="{decoder}image_newline",
)
ORIGINAL = Layout(
    name="original",
    title="MoE-LLaVA, as released",
    tower="{decoder}image_tower.image_tower.vision_model.",
    projector=("{decoder}mm_projector.image_spatial_proj.0", "{decoder}mm_projector.image_spatial_proj.2"),
    expert="deepspeed_moe.experts.deepspeed_experts.{k}.",
    router="deepspeed_moe.gate.wg.",
    residual="mlp.",
    shared="shared_expert.",
    coefficient="coefficient.",
    by_family=False,
)
# On disk transformers keeps the names of its version 4, also when version 5 writes.
TRANSFORMERS = Layout(
    name="transformers",
    title="transformers' LlavaForConditionalGeneration",
    language="language_model.",
    tower="vision_tower.vision_model.",
    projector=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    newline="image_newline",
    expert="experts.{k}.",
    router="gate.",
    residual="mlp.",
    shared="shared_expert.",
    coefficient="coefficient.",
)
# Towers at native resolution: written as the class has its names in memory.
NATIVE = replace(
    TRANSFORMERS,
    title="transformers' Lfm2VlForConditionalGeneration",
    language="",
    moved_decoder="model.language_model.",
    tower="model.vision_tower.",
    projector=("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
)
# In memory (and on disk, for a class of our own) transformers 5 has these names.
OWN = replace(
    TRANSFORMERS,
    name="own",
    title="transformers with modeling_moe_llava.py",
    language="",
    moved_decoder="model.language_model.",
    tower="model.vision_tower.",
    projector=NATIVE.projector,
    is_published=False,
)
LAYOUTS = {layout.name: layout for layout in (LANGUAGE_MODEL, VISION_TOWER, LLAVA, ORIGINAL, TRANSFORMERS)}


@dataclass(frozen=True, slots=True)
class Span:
    """`count` elements from `start` on, of tensor number `tensor` of an entry."""

    tensor: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron tensor and the tensors of a layout that hold the same elements. `spans` are in Megatron's order."""

    megatron: str
    shape: Shape
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    spans: tuple[Span, ...]


def entries(model: Model, layout: Layout) -> list[Entry]:
    """The whole correspondence. A Megatron tensor without a line in a table is our own bug, hence the assertion."""
    if model.tower is not None:
        check_vision_experts(model, layout.name)
    wanted, own = megatron_tensors(model), model.backbone.hf.experts
    if own is not None and layout.by_family:
        names = ("expert", "router", "expert_bias", "shared", "shared_gate")
        module = f".{own.module}" if layout.is_published else MLP
        layout = replace(layout, module=module, **{name: getattr(own, name) for name in names})
    found = [*_language_entries(model, layout, wanted), *_tower_entries(model, layout, wanted)]
    found += _projector_entries(model, layout, wanted)
    missing = wanted.keys() - {entry.megatron for entry in found}
    assert not missing, f"mapping tables of {model.backbone.name} lack {sorted(missing)}"
    return found


def check_vision_experts(model: Model, layout: str) -> None:
    """ConfigError where the tower or the projector has experts and the layout holds more than the language model: no class
    of others has them."""
    sections = [name for name in ("tower_moe", "projector_moe") if getattr(model, name)]
    if sections and layout != LANGUAGE_MODEL.name:
        parts = " and the ".join(name.removesuffix("_moe") for name in sections)
        raise ConfigError(
            f"layout {layout} has no experts in the {parts} ({', '.join(sections)}); chat, serve and evaluate read the "
            f"checkpoint itself, and --layout {LANGUAGE_MODEL.name} exports the language model alone"
        )


def _language_entries(model: Model, layout: Layout, wanted: dict[str, Shape]) -> Iterator[Entry]:
    for mapping in model.backbone.mapping:
        for layer in range(model.backbone.num_layers) if "{i}" in mapping.megatron else (None,):
            is_moe = layer in model.moe_layers and MLP in mapping.megatron
            for lifted, experts in _lifted(mapping, layout, model) if is_moe else ((mapping, 0),):
                entry = _entry(lifted, layer, LANGUAGE, layout, model, wanted, experts)
                if entry:
                    yield entry
    for layer in model.moe_layers:
        yield from _router_entries(model, layer, layout, wanted)


def _lifted(mapping: Mapping, layout: Layout, model: Model) -> Iterator[tuple[Mapping, int]]:
    """An MLP line as the line of all experts, and as the line of the residual MLP."""
    if not layout.expert:
        raise ConfigError(f"layout {layout.name} has no experts; a MoE model needs one of: original, transformers")

    def renamed(megatron: str, *hf: str) -> Mapping:
        names = tuple(name.replace(MLP, layout.module + part, 1) for part in hf for name in mapping.hf)
        return type(mapping)(mapping.megatron.replace(MLP, MLP + megatron, 1), names)

    experts = model.required_moe.num_moe_experts
    yield renamed(EXPERTS, *(layout.expert.format(k=expert) for expert in range(experts))), experts
    if model.required_moe.use_residual:
        yield renamed(RESIDUAL, layout.residual), 0
    if model.required_moe.moe_shared_expert_intermediate_size:
        yield renamed(SHARED_EXPERTS, layout.shared), 0


def _router_entries(model: Model, layer: int, layout: Layout, wanted: dict[str, Shape]) -> Iterator[Entry]:
    mlp = next(mapping for mapping in model.backbone.mapping if MLP in mapping.megatron)
    ours, theirs = mlp.megatron.split(MLP)[0] + MLP, mlp.hf[0].split(MLP)[0] + layout.module
    tensors = [("router.weight", f"{layout.router}weight")]
    if model.required_moe.moe_router_enable_expert_bias:
        tensors.append(("router.expert_bias", f"{layout.router}{layout.expert_bias}"))
    if model.required_moe.moe_shared_expert_gate:
        tensors.append((f"{SHARED_EXPERTS}{SHARED_GATE}", layout.shared_gate))
    if model.required_moe.use_residual:
        tensors += [(f"coefficient.{part}", f"{layout.coefficient}{part}") for part in ("weight", "bias")]
    for megatron, hf in tensors:
        mapping = Mapping(ours + megatron, (theirs + hf,))
        yield _required_entry(mapping, layer, LANGUAGE, layout, model, wanted)


def tower_entries(model: Model, layout: Layout) -> list[Entry]:
    """The part of `entries` that is the tower's."""
    return list(_tower_entries(model, layout, megatron_tensors(model)))


def _tower_entries(model: Model, layout: Layout, wanted: dict[str, Shape]) -> Iterator[Entry]:
    if model.tower is None or not layout.tower:
        return
    for mapping in model.tower.mapping:
        for layer in range(model.tower.num_used_layers) if "{i}" in mapping.megatron else (None,):
            yield _required_entry(mapping, layer, TOWER, layout, model, wanted)


def _projector_entries(model: Model, layout: Layout, wanted: dict[str, Shape]) -> Iterator[Entry]:
    if model.tower is None or layout.projector is None:
        return
    for number, name in enumerate(layout.projector, start=1):
        for part in ("weight", "bias"):
            mapping = Mapping(f"linear_fc{number}.{part}", (f"{name}.{part}",))
            yield _required_entry(mapping, None, PROJECTOR, layout, model, wanted)
    if model.tower.newline:
        mapping = Mapping("image_newline.weight", (layout.newline or f"{PROJECTOR}image_newline.weight",))
        yield _required_entry(mapping, None, PROJECTOR, layout, model, wanted)


def _required_entry(
    mapping: Mapping, layer, ours: str, layout: Layout, model: Model, wanted: dict[str, Shape]
) -> Entry:
    entry = _entry(mapping, layer, ours, layout, model, wanted)
    assert entry, f"the model has no {ours}{mapping.megatron}"
    return entry


def _entry(
    mapping: Mapping, layer, ours: str, layout: Layout, model: Model, wanted: dict[str, Shape], experts: int = 0
) -> Entry | None:
    """A line of a table for one layer; None when this size of the family has no such tensor (a tied output layer)."""
    key = ours + mapping.megatron.replace("{i}", str(layer))
    if key not in wanted:
        return None
    names = tuple(outside_name(name.replace("{i}", str(layer)), ours, layout, model) for name in mapping.hf)
    heads: Heads = model.required_tower.heads if ours == TOWER else model.backbone.heads
    shape = wanted[key]
    dense = shape[1:] if experts else shape  # of one expert; the experts lie behind each other
    width, stride = math.prod(dense[1:]), len(names) // max(experts, 1)
    one = type(mapping)(mapping.megatron, names[:stride])
    pieces = one.pieces(dense[0], heads)
    spans = tuple(
        Span(expert * stride + piece.source, piece.start * width, piece.rows * width)
        for expert in range(max(experts, 1))
        for piece in pieces
    )
    return Entry(key, shape, names, one.hf_shapes(dense, heads) * max(experts, 1), spans)


def outside_name(name: str, ours: str, layout: Layout, model: Model) -> str:
    """A tensor's name in a layout, from its name in a table; `ours` is the module it belongs to."""
    decoder = model.backbone.hf.prefix
    if ours == TOWER:
        return layout.tower.format(decoder=decoder) + name.removeprefix("vision_model.")
    if ours == PROJECTOR:
        return name.format(decoder=decoder)
    if layout.moved_decoder and name.startswith(decoder):
        return layout.moved_decoder + name.removeprefix(decoder)
    return layout.language + name
