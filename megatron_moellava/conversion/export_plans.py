"""What an export in each layout consists of, before it is written: weights, small files, notes."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.checkpoint.description import trained_with
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion import for_generation, huggingface, original
from megatron_moellava.conversion.added_weights import (
    image_token_of,
    missing_biases,
    with_empty_experts,
    with_vocabulary,
)
from megatron_moellava.conversion.asked_as import asked_as
from megatron_moellava.conversion.chat_template import chat_template
from megatron_moellava.conversion.exportable import check_has_unused
from megatron_moellava.conversion.initial import language_dtype, zeros
from megatron_moellava.conversion.layout import (
    LANGUAGE_MODEL,
    LLAVA,
    NATIVE,
    ORIGINAL,
    OWN,
    TRANSFORMERS,
    VISION_TOWER,
    Layout,
    entries,
)
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint
from megatron_moellava.conversion.native import native_config
from megatron_moellava.conversion.recipes import Recipe, export_recipes, identity
from megatron_moellava.conversion.served_tokenizer import ServedTokenizer, served_tokenizer
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.costs.shapes import TOWER, UNUSED, Model
from megatron_moellava.towers.from_config import processor_config_of, published_config_of

MODELLING_FILE = "modeling_moe_llava.py"


@dataclass(slots=True)
class Export:
    """What will be written: weights, and small files by name."""

    recipes: list[Recipe]
    tensors: dict[str, Tensor]
    files: dict[str, Any]  # JSON content, a file to copy, or its text
    title: str
    notes: list[str] = field(default_factory=list)  # for a person: what the layout's own code computes otherwise
    has_tokenizer: bool = False  # `files` has it; otherwise the folder's files are copied
    use: str = "original"  # how to load it, of model_card.USES


def _plan_original(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    check_has_unused(source)
    moe = source.model.moe
    if moe and moe.moe_ffn_hidden_size:
        raise ConfigError(
            f"moe.moe_ffn_hidden_size={moe.moe_ffn_hidden_size}: MoE-LLaVA's own experts have the width of the dense MLP, so "
            "its code could not load these; export --layout transformers"
        )
    config = original.original_config(source.model, *described(source))
    recipes, notes = _weights(source, source.model, ORIGINAL, dtype), original.notes_of(config)
    return Export(recipes, source.tensors, {"config.json": config}, ORIGINAL.title, notes)


def _plan_llava(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    check_has_unused(source)
    if source.model.moe or source.model.backbone.hf.family != "llama":
        raise ConfigError(
            "--layout llava is LLaVA-1.5's: a dense Llama or Vicuna; use --layout original or transformers"
        )
    config = original.llava_config(source.model, *described(source))
    recipes, notes = _weights(source, source.model, LLAVA, dtype), original.notes_of(config)
    return Export(recipes, source.tensors, {"config.json": config}, LLAVA.title, notes)


def _plan_language_model(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    model = Model(backbone=source.model.backbone, moe=source.model.moe)
    config = hf_config_of(model.backbone)
    if said := asked_as(model, trained_with(source.run), {}):
        config["trained_with"] = {"data": said}
    files, notes = _to_chat(source, served_tokenizer(tokenizer, with_image=False), tokenizer) if tokenizer else ({}, [])
    recipes, tensors = _weights(source, model, LANGUAGE_MODEL, dtype), dict(source.tensors)
    for name in set(model.backbone.hf.drops) - {recipe.name for recipe in recipes}:  # transformers' Phi insists on it
        tensors[name] = zeros((model.backbone.vocab_size,), dtype or language_dtype(source.tensors))
        recipes.append(identity(name, tensors[name]))
    return Export(
        recipes,
        tensors,
        {"config.json": config} | files,
        LANGUAGE_MODEL.title,
        notes,
        bool(tokenizer),
        "language model",
    )


def _to_chat(
    source: Checkpoint, served: ServedTokenizer, tokenizer: Path
) -> tuple[dict[str, dict | Path | str], list[str]]:
    """(tokenizer and chat template, notes)"""
    template = for_generation.template_of(source.model, trained_with(source.run))
    different = served.different(tokenizer, template)
    notes = [f"its tokenizer gives other ids than in training, of {different[0]!r}"] if different else []
    return served.files | {"chat_template.jinja": chat_template(template, served)}, notes


def _plan_tower(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    check_has_unused(source)
    tower = source.model.required_tower
    recipes = _weights(source, source.model, replace(ORIGINAL, tower=VISION_TOWER.tower), dtype)
    recipes = [recipe for recipe in recipes if recipe.name.startswith(VISION_TOWER.tower)]
    config = published_config_of(tower) | ({"vision_use_head": _has_head(source)} if tower.native else {})
    files = {"config.json": config, "preprocessor_config.json": processor_config_of(tower)}
    return Export(recipes, source.tensors, files, VISION_TOWER.title)


def _has_head(source: Checkpoint) -> bool:
    return any(name.startswith(f"{UNUSED}head.") for name in source.tensors)


def _plan_native(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    """Lfm2VlForConditionalGeneration over the language model's own class."""
    model, tower = huggingface.as_transformers(source.model), source.model.required_tower
    job, vocab, image_token = _whole(source, model, NATIVE, tokenizer, dtype, NATIVE.title, "native")
    job.files["config.json"] = native_config(model, vocab, image_token, trained_with(source.run), _has_head(source))
    job.files["preprocessor_config.json"] = processor_config_of(tower)
    units = ", in units of one patch instead of two" if tower.shuffle > 1 else ""
    job.notes.insert(
        0,
        "transformers' LFM2-VL resizes pictures by another rule; preprocessor_config.json is SigLIP 2's own" + units,
    )
    return job


def _plan_transformers(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    """LlavaForConditionalGeneration, stock where it computes the same, else with a modelling file beside the weights."""
    check_has_unused(source)
    if source.model.required_tower.native:
        return _plan_native(source, tokenizer, dtype)
    settings = trained_with(source.run).get("data", {})
    newline = source.model.required_tower.newline
    if newline and not settings.get("image_grid"):
        raise ConfigError(
            "data.image_grid=false: transformers' classes with ends of lines tile every picture, so they would see other ones "
            "than this model was trained with; train with data.image_grid=true, or with a tower without @newline"
        )
    if settings.get("image_grid") and not newline:
        raise ConfigError(
            "data.image_grid=true: LlavaForConditionalGeneration does not tile pictures, so it would see other ones than "
            "this model was trained with; export --layout original, which says so in its config.json"
        )
    reason = huggingface.needs_modelling_file(source.model)
    if reason and newline:
        raise ConfigError(
            f"--layout transformers: {reason}, and the modelling file does not tile pictures; export --layout "
            "language-model, tower and projector"
        )
    moe = source.model.moe
    if moe and moe.moe_router_num_groups and (reason or source.model.backbone.hf.experts is None):
        raise ConfigError(
            f"moe.moe_router_num_groups={moe.moe_router_num_groups}: neither a class of transformers nor the modelling file of "
            "exports chooses among groups of these experts; export --layout original, which says so in its config.json"
        )
    model = huggingface.as_transformers(source.model)
    layout = OWN if reason else TRANSFORMERS
    title = layout.title
    if newline:
        title = f"transformers' {huggingface.NEWLINE_CLASSES[source.model.required_tower.tiling]['architectures'][0]}"
    title += f" ({reason})" if reason else ""
    use = "modelling file" if reason else "transformers"
    job, vocab, image_token = _whole(source, model, layout, tokenizer, dtype, title, use)
    job.files["config.json"] = huggingface.export_config(model, vocab, image_token, trained_with(source.run))
    ratio = settings.get("image_aspect_ratio", "pad")
    job.files |= for_generation.processor_files(model.required_tower, ratio)
    if reason:
        job.files[MODELLING_FILE] = Path(__file__).with_name(MODELLING_FILE)
    return job


def _whole(
    source: Checkpoint, model: Model, layout: Layout, tokenizer: Path | None, dtype: str | None, title: str, use: str
) -> tuple[Export, int, int]:
    """All weights under transformers' names and what generation needs; (it, rows of the vocabulary, id of <image>)."""
    tensors = source.tensors | missing_biases(model, source)
    recipes = _weights(replace(source, tensors=tensors), model, layout, dtype)
    served = served_tokenizer(tokenizer) if tokenizer else None
    vocab, image_token = image_token_of(source, model, served)
    recipes, tensors = with_vocabulary(recipes, tensors, model, vocab)
    recipes, tensors = with_empty_experts(recipes, tensors, model, layout, dtype)
    added = list(range(model.backbone.vocab_size, vocab))
    files, notes = _to_chat(source, served, tokenizer) if served and tokenizer else ({}, [])
    files["generation_config.json"] = {"suppress_tokens": added} if added else {}
    return Export(recipes, tensors, files, title, notes, bool(served), use), vocab, image_token


def _weights(source: Checkpoint, model: Model, layout: Layout, dtype: str | None) -> list[Recipe]:
    """All tensors of a layout, the tower's unused ones included."""
    lines = entries(model, layout)
    recipes = export_recipes(lines, source.tensors, dtype)
    if model.tower and any(entry.megatron.startswith(TOWER) for entry in lines):
        prefix = layout.tower.format(decoder=model.backbone.hf.prefix)
        recipes += [
            _cast(identity(name, tensor, prefix + name.removeprefix(UNUSED)), dtype)
            for name, tensor in source.tensors.items()
            if name.startswith(UNUSED)
        ]
    return recipes


def _cast(recipe: Recipe, dtype: str | None) -> Recipe:
    return replace(recipe, dtype=dtype) if dtype else recipe


def described(source: Checkpoint) -> tuple[dict, dict[str, dict]]:
    """(the config that was imported, what the weights were trained with)."""
    return source.run.provenance.get("hf_config") or {}, trained_with(source.run)


PLANS = {
    ORIGINAL.name: _plan_original,
    LLAVA.name: _plan_llava,
    LANGUAGE_MODEL.name: _plan_language_model,
    VISION_TOWER.name: _plan_tower,
    TRANSFORMERS.name: _plan_transformers,
}
