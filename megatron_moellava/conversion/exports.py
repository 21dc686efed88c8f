"""A Megatron checkpoint -> any layout: MoE-LLaVA's or LLaVA-1.5's releases, transformers, the parts one by one."""

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.checkpoint.description import trained_with
from megatron_moellava.checkpoint.sums import verify_sums, write_sums
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion import for_generation, huggingface, original
from megatron_moellava.conversion.asked_as import asked_as
from megatron_moellava.conversion.chat_template import chat_template
from megatron_moellava.conversion.gguf_export import check_gguf, gguf_notes, write_gguf
from megatron_moellava.conversion.imports import TOWER_FILE, is_unused, tower_file
from megatron_moellava.conversion.initial import language_dtype, zeros
from megatron_moellava.conversion.layout import (
    LANGUAGE_MODEL,
    LAYOUTS,
    LLAVA,
    NATIVE,
    NEWLINE,
    ORIGINAL,
    OWN,
    TRANSFORMERS,
    VISION_TOWER,
    Layout,
    check_vision_experts,
    entries,
    outside_name,
)
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint, check_complete, open_checkpoint
from megatron_moellava.conversion.modality import check_no_branches
from megatron_moellava.conversion.model_card import model_card
from megatron_moellava.conversion.native import native_config
from megatron_moellava.conversion.quantised import check_quantised, quantised
from megatron_moellava.conversion.recipes import Part, Recipe, export_recipes, identity
from megatron_moellava.conversion.served_tokenizer import ServedTokenizer, served_tokenizer
from megatron_moellava.conversion.tensors import Files, Tensor
from megatron_moellava.conversion.writers import Progress, staged, write_safetensors
from megatron_moellava.costs.shapes import LANGUAGE, PROJECTOR, TOWER, UNUSED, Model, megatron_tensors
from megatron_moellava.data.llama_tokenizer import DEFAULTS
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import Tower, get_tower
from megatron_moellava.towers.from_config import processor_config_of, published_config_of

TOKENIZER_FILES = (
    "token",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "qwen.tiktoken",
    "arcade100k.tiktoken",
)
GGUF = "gguf"
PARTS = (LANGUAGE_MODEL.name, VISION_TOWER.name, "projector")  # layouts of a part of the model
EXPORT_LAYOUTS = (*LAYOUTS, "projector", GGUF)
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


def export_checkpoint(
    checkpoint: Path,
    *,
    save: Path,
    layout: str,
    tokenizer: Path | None = None,
    tower: Path | None = None,
    dtype: str | None = None,
    licence: str = "",
    scores: Path | None = None,
    gguf_type: str = "f16",
    quantize: str = "",
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Write `checkpoint` in `layout` (one of EXPORT_LAYOUTS) to folder `save`, with config and tokenizer files.

    `tower`: a folder with the published tower, for its tensors that training does not keep (the last layer).
    `licence`, `scores`: for the model card (a licence's name on the hub; a scores.json of `moellava evaluate`).
    `gguf_type`: of the matrices of layout "gguf", one of gguf_metadata.FILE_TYPES.
    `quantize`: "", or one of quantised.KINDS.
    `verify`: False uses what is read without comparing digests. The folder gets a SHA256SUMS of all its files.
    Raises ConfigError or CheckpointError before anything is written.
    """
    if quantize:
        check_quantised(quantize)
        if layout not in (TRANSFORMERS.name, LANGUAGE_MODEL.name):
            raise ConfigError(f"--quantize {quantize}: --layout {layout} cannot say it; export --layout transformers")
    source = open_checkpoint(checkpoint, verify=verify)
    check_complete(source)
    check_vision_experts(source.model, layout)
    _check_exportable(source, layout)
    source = replace(
        source, model=replace(source.model, branches=())
    )  # what it had of them is no part of these layouts
    if tower:
        verify_sums(Path(tower), verify=verify)
        source = _with_unused(source, Path(tower))
    if layout == "projector":
        return _export_projector(source, Path(save))
    if layout == GGUF:
        check_gguf(source, tokenizer)
        begin(sum(tensor.nbytes for tensor in source.tensors.values()))
        with _as_folder(tokenizer) as tokenizer, staged(Path(save)) as staging:
            assert tokenizer is not None  # check_gguf has asked for it
            digests = write_gguf(source, staging, kind=gguf_type, tokenizer=tokenizer, progress=progress)
            write_sums(staging, digests)
        return {"folder": str(save), "layout": f"GGUF ({gguf_type})", "tensors": len(source.tensors)} | {
            "files": sorted(digests),
            "notes": gguf_notes(source),
        }
    with _as_folder(tokenizer) as tokenizer:
        job = PLANS[layout](source, tokenizer, dtype)
        _say_where_answers_end(job, source, tokenizer)
        if tokenizer and not job.has_tokenizer:
            job.files |= _tokenizer_files(tokenizer, job.files)
        if quantize:
            job.recipes, job.tensors, config = quantised(job.recipes, job.tensors, quantize)
            job.files["config.json"]["quantization_config"] = config
            job.title += f", weights in {quantize}"
        if layout != VISION_TOWER.name:
            model = source.model if layout != LANGUAGE_MODEL.name else replace(source.model, tower=None)
            use = job.use if job.has_tokenizer or job.use == "original" else "no tokenizer"
            job.files["README.md"] = model_card(
                Path(save).name, model, source.run, title=job.title, use=use, licence=licence, scores=scores
            )
        begin(sum(recipe.nbytes for recipe in job.recipes))
        with staged(Path(save)) as staging:
            digests = write_safetensors(staging, job.recipes, job.tensors, progress)
            _write_files(staging, job.files)
            write_sums(staging, digests)
    return {
        "folder": str(save),
        "layout": job.title,
        "tensors": len(job.recipes),
        "files": sorted(job.files),
        "notes": job.notes,
    }


def _say_where_answers_end(job: Export, source: Checkpoint, tokenizer: Path | None) -> None:
    """Ids of special tokens in config.json and generation_config.json; the source's own settings of generation are kept."""
    if job.title == VISION_TOWER.title:
        return
    kept = _inherited(source.run.provenance, "generation_config") or {}
    said = {**(source.run.provenance.get("hf_config") or {}), **kept}
    template = for_generation.template_of(source.model, trained_with(source.run))
    ids = for_generation.special_ids(template, tokenizer, said)
    config = job.files["config.json"]
    for part in (config, config.get("text_config")):
        if part is not None:
            part |= {name: value for name, value in ids.items() if part.get(name) is None}
    generation = kept | job.files.get("generation_config.json", {}) | ids
    if generation:
        job.files["generation_config.json"] = generation
    if "eos_token_id" not in ids:
        job.notes.append("it does not say where answers end, so generation runs to its limit; give --tokenizer")


def _inherited(provenance: dict | None, name: str):
    """What the weights' history says of `name`: the youngest of its steps that does."""
    while provenance:
        if provenance.get(name):
            return provenance[name]
        provenance = provenance.get("parent")
    return None


def _check_exportable(source: Checkpoint, layout: str) -> None:
    """What Megatron-Core can train and the released layouts cannot hold."""
    moe, tower, backbone = source.model.moe, source.model.tower, source.model.backbone
    _check_modalities(trained_with(source.run), layout)
    if layout not in PARTS:
        check_no_branches(source.model, f"--layout {layout}")
    if tower and layout in (ORIGINAL.name, LLAVA.name, TRANSFORMERS.name):
        _check_tower(tower, layout)
    if moe and moe.expert_groups and layout not in (VISION_TOWER.name, "projector"):
        _check_groups(source.model, layout)
    if moe is None or layout in (TRANSFORMERS.name, VISION_TOWER.name, "projector", GGUF):
        return
    if backbone.hf.experts is not None:
        if layout == LANGUAGE_MODEL.name:
            return
        raise ConfigError(
            f"--layout {layout}: that code has no {backbone.hf.family}, whose own models have experts; export --layout "
            "transformers, or language-model"
        )
    fields = ("moe_router_enable_expert_bias", "moe_shared_expert_intermediate_size")
    beyond = [f"moe.{name}={getattr(moe, name)}" for name in fields if getattr(moe, name)]
    if beyond:
        raise ConfigError(f"{', '.join(beyond)}: --layout {layout} cannot say it; export --layout transformers")


def _check_modalities(trained: dict[str, dict], layout: str) -> None:
    """No processor of others shows levels as a record of `data.modalities` does."""
    names = for_generation.levels_of_others(trained)
    if names and layout in (TRANSFORMERS.name, GGUF):
        raise ConfigError(
            f"data.modalities: --layout {layout} has no pictures of {names}, and its processor would show their levels "
            "otherwise than this model was trained with; export --layout original, which says so in its config.json, or "
            "--layout language-model, tower and projector"
        )


def _check_groups(model: Model, layout: str) -> None:
    """Experts by modality are in no published class, and nothing without pictures knows which token is of one."""
    tower = model.tower
    stock = model.backbone.hf.experts is not None or (tower is not None and (tower.native or tower.newline))
    if layout != TRANSFORMERS.name or stock:
        raise ConfigError(
            f"moe.expert_groups: --layout {layout} of this model has no experts by modality, and without them it would be "
            "another model; "
            + (
                "no layout has"
                if stock
                else "export --layout transformers, whose modelling file beside the weights has them"
            )
        )


def _check_tower(tower: Tower, layout: str) -> None:
    """Native resolution is LFM2-VL's alone, and a pixel shuffle without it nobody's."""
    if tower.tiles.single_only and layout == LLAVA.name:
        raise ConfigError(f"model.tower={tower.name}: --layout llava is LLaVA-NeXT's; export --layout transformers")
    if tower.newline and layout == ORIGINAL.name:
        raise ConfigError(
            f"model.tower={tower.name}: MoE-LLaVA's code puts no tiles together; export --layout transformers"
        )
    if tower.native and layout != TRANSFORMERS.name:
        raise ConfigError(
            f"model.tower={tower.name}: --layout {layout} has no native resolution; export --layout transformers"
        )
    if tower.takes_videos:
        raise ConfigError(
            f"model.tower={tower.name}: --layout {layout} has no tower that attends across the frames of a video; export "
            "--layout language-model, tower and projector"
        )
    if tower.shuffle > 1 and not tower.native:
        raise ConfigError(
            f"model.tower={tower.name}: --layout {layout} has no projector {tower.projector!r}; export --layout "
            "language-model, tower and projector"
        )


def _with_unused(source: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with the published tower's unused tensors beside it. ConfigError for a tower of other sizes."""
    if source.model.tower is None:
        raise ConfigError(f"{source.folder} has no vision tower; leave --tower out")
    ours, theirs = source.model.tower, get_tower(str(folder))
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "image_size", "patch_size")
    differ = [
        f"{name}={getattr(theirs, name)} instead of {getattr(ours, name)}"
        for name in sizes
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if differ:
        raise ConfigError(
            f"--tower {folder} is not the model's tower {ours.name}: {', '.join(differ)}; give the tower it was made with"
        )
    found = {
        UNUSED + name.removeprefix(TOWER_FILE): tensor
        for name, tensor in tower_file(folder).items()
        if is_unused(name.removeprefix(TOWER_FILE), source.model.tower)
    }
    return replace(source, tensors=found | source.tensors)


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


def _needs_unused(source: Checkpoint) -> None:
    if source.model.tower is None:
        raise ConfigError(f"{source.folder} has no vision tower; export it with --layout language-model")
    if source.model.tower.native:  # its features need every layer, and a pooling head may be missing
        return
    if not any(name.startswith(UNUSED) for name in source.tensors):
        raise CheckpointError(
            f"{source.folder} lacks the tower's last layer, which training does not need; give --tower the tower's folder"
        )


def _described(source: Checkpoint) -> tuple[dict, dict[str, dict]]:
    """(the config that was imported, what the weights were trained with)."""
    return source.run.provenance.get("hf_config") or {}, trained_with(source.run)


def _plan_original(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    _needs_unused(source)
    moe = source.model.moe
    if moe and moe.moe_ffn_hidden_size:
        raise ConfigError(
            f"moe.moe_ffn_hidden_size={moe.moe_ffn_hidden_size}: MoE-LLaVA's own experts have the width of the dense MLP, so "
            "its code could not load these; export --layout transformers"
        )
    config = original.original_config(source.model, *_described(source))
    recipes, notes = _weights(source, source.model, ORIGINAL, dtype), original.notes_of(config)
    return Export(recipes, source.tensors, {"config.json": config}, ORIGINAL.title, notes)


def _plan_llava(source: Checkpoint, tokenizer: Path | None, dtype: str | None) -> Export:
    _needs_unused(source)
    if source.model.moe or source.model.backbone.hf.family != "llama":
        raise ConfigError(
            "--layout llava is LLaVA-1.5's: a dense Llama or Vicuna; use --layout original or transformers"
        )
    config = original.llava_config(source.model, *_described(source))
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
    _needs_unused(source)
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
    _needs_unused(source)
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
    tensors = source.tensors | _missing_biases(model, source)
    recipes = _weights(replace(source, tensors=tensors), model, layout, dtype)
    served = served_tokenizer(tokenizer) if tokenizer else None
    vocab, image_token = _image_token(source, model, served)
    recipes, tensors = _with_vocabulary(recipes, tensors, model, vocab)
    recipes, tensors = _with_empty_experts(recipes, tensors, model, layout, dtype)
    added = list(range(model.backbone.vocab_size, vocab))
    files, notes = _to_chat(source, served, tokenizer) if served and tokenizer else ({}, [])
    files["generation_config.json"] = {"suppress_tokens": added} if added else {}
    return Export(recipes, tensors, files, title, notes, bool(served), use), vocab, image_token


PLANS = {
    ORIGINAL.name: _plan_original,
    LLAVA.name: _plan_llava,
    LANGUAGE_MODEL.name: _plan_language_model,
    VISION_TOWER.name: _plan_tower,
    TRANSFORMERS.name: _plan_transformers,
}


def _missing_biases(model: Model, source: Checkpoint) -> dict[str, Tensor]:
    """Zeros for the biases that the target family has and the model has not."""
    dtype = language_dtype(source.tensors)
    return {
        name: zeros(shape, dtype)
        for name, shape in megatron_tensors(model).items()
        if name.endswith("linear_qkv.bias") and name not in source.tensors
    }


def _image_token(source: Checkpoint, model: Model, served: ServedTokenizer | None) -> tuple[int, int]:
    """(rows of the vocabulary, id of <image>). The id needs a row of its own; it is the first that the tokenizer lacks.

    Without a tokenizer it is the one that the model was imported with. Rows are added, in steps of 64 as transformers' own
    LLaVA has them, when the published vocabulary is full.
    """
    vocab, config = model.backbone.vocab_size, source.run.provenance.get("hf_config") or {}
    known = config.get("image_token_index", config.get("image_token_id"))
    imported = known if isinstance(known, int) and 0 <= known < vocab else vocab
    token = served.image_token if served else imported
    return (vocab, token) if token < vocab else (token // 64 * 64 + 64, token)


def _with_empty_experts(
    recipes: list[Recipe], tensors: dict[str, Tensor], model: Model, layout: Layout, dtype: str | None
) -> tuple[list[Recipe], dict[str, Tensor]]:
    """The shared experts that Qwen2-MoE insists on, as zeros."""
    shapes, kind = huggingface.empty_shared_experts(model), dtype or language_dtype(tensors)
    empty = {outside_name(name, LANGUAGE, layout, model): zeros(shape, kind) for name, shape in shapes.items()}
    return recipes + [identity(name, tensor) for name, tensor in empty.items()], tensors | empty


def _with_vocabulary(
    recipes: list[Recipe], tensors: dict[str, Tensor], model: Model, vocab: int
) -> tuple[list[Recipe], dict[str, Tensor]]:
    """Embedding and output rows of zeros up to `vocab`; generation_config forbids their ids."""
    added = vocab - model.backbone.vocab_size
    if not added:
        return recipes, tensors
    keys = [
        f"{LANGUAGE}{name}" for name in ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
    ]
    grown = []
    for recipe in recipes:
        if recipe.parts[0].source in keys:
            extra = (added, *recipe.shape[1:])
            name = f"{recipe.name} (added rows)"
            tensors = tensors | {name: zeros(extra, tensors[recipe.parts[0].source].dtype)}
            parts = (*recipe.parts, Part(name, 0, math.prod(extra)))
            recipe = replace(recipe, shape=(vocab, *recipe.shape[1:]), parts=parts)
        grown.append(recipe)
    return grown, tensors


@contextlib.contextmanager
def _as_folder(tokenizer: Path | None) -> Iterator[Path | None]:
    """The tokenizer as a folder: a SentencePiece .model alone, which training takes too, gets what transformers wants."""
    if tokenizer is None or not Path(tokenizer).is_file():
        yield Path(tokenizer) if tokenizer else None
        return
    load_tokenizer(tokenizer)  # a ConfigError for a file that is none
    with tempfile.TemporaryDirectory() as made:
        shutil.copyfile(tokenizer, Path(made) / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **DEFAULTS}
        (Path(made) / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
        yield Path(made)


def _tokenizer_files(folder: Path, taken: dict) -> dict[str, Path]:
    """The tokenizer's files, but for those that the export has itself."""
    files = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and (file.name.startswith(TOKENIZER_FILES) or file.suffix == ".py")
    }
    if not files:
        raise ConfigError(f"--tokenizer {folder} holds no tokenizer files; give the folder of the language model")
    return {name: file for name, file in files.items() if name not in taken}


def _write_files(folder: Path, files: dict[str, dict | Path | str]) -> None:
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        elif isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _export_projector(source: Checkpoint, save: Path) -> dict:
    """`mm_projector.bin`, what stage 1 leaves and the original's stage 2 begins with; config.json beside it."""
    import torch

    lines = [
        line
        for line in entries(source.model, replace(ORIGINAL, newline=NEWLINE))
        if line.megatron.startswith(PROJECTOR)
    ]
    if not lines:
        raise ConfigError(f"{source.folder} has no projector")
    state = {}
    with Files() as files:
        for line in lines:
            tensor = source.tensors[line.megatron]
            content = bytearray().join(bytes(block) for block in files.blocks(tensor, 0, tensor.numel))
            state[line.names[0]] = torch.frombuffer(content, dtype=getattr(torch, tensor.dtype)).view(line.shape)
    config = original.original_config(source.model, *_described(source))
    with staged(save) as staging:
        torch.save(state, staging / "mm_projector.bin")
        _write_files(staging, {"config.json": config})
        write_sums(staging, {})
    return {"folder": str(save), "layout": "mm_projector.bin", "tensors": len(state), "files": ["config.json"]} | {
        "notes": original.notes_of(config)
    }
