"""A Megatron checkpoint -> any layout: MoE-LLaVA's or LLaVA-1.5's releases, transformers, the parts one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_moellava.checkpoint.description import trained_with
from megatron_moellava.checkpoint.sums import verify_sums, write_sums
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion import for_generation, original
from megatron_moellava.conversion.export_files import as_folder, tokenizer_files, write_files
from megatron_moellava.conversion.export_plans import PLANS, Export, described
from megatron_moellava.conversion.exportable import GGUF, check_exportable
from megatron_moellava.conversion.gguf_export import check_gguf, gguf_notes, write_gguf
from megatron_moellava.conversion.imports import TOWER_FILE, is_unused, tower_file
from megatron_moellava.conversion.layout import (
    LANGUAGE_MODEL,
    LAYOUTS,
    NEWLINE,
    ORIGINAL,
    TRANSFORMERS,
    VISION_TOWER,
    check_vision_experts,
    entries,
)
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint, check_complete, open_checkpoint
from megatron_moellava.conversion.model_card import model_card
from megatron_moellava.conversion.quantised import check_quantised, quantised
from megatron_moellava.conversion.tensors import Files
from megatron_moellava.conversion.writers import Progress, staged, write_safetensors
from megatron_moellava.costs.shapes import PROJECTOR, UNUSED
from megatron_moellava.towers import get_tower

EXPORT_LAYOUTS = (*LAYOUTS, "projector", GGUF)


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
    check_exportable(source, layout)
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
        with as_folder(tokenizer) as tokenizer, staged(Path(save)) as staging:
            assert tokenizer is not None  # check_gguf has asked for it
            digests = write_gguf(source, staging, kind=gguf_type, tokenizer=tokenizer, progress=progress)
            write_sums(staging, digests)
        return {"folder": str(save), "layout": f"GGUF ({gguf_type})", "tensors": len(source.tensors)} | {
            "files": sorted(digests),
            "notes": gguf_notes(source),
        }
    with as_folder(tokenizer) as tokenizer:
        job = PLANS[layout](source, tokenizer, dtype)
        _say_where_answers_end(job, source, tokenizer)
        if tokenizer and not job.has_tokenizer:
            job.files |= tokenizer_files(tokenizer, job.files)
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
            write_files(staging, job.files)
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
    config = original.original_config(source.model, *described(source))
    with staged(save) as staging:
        torch.save(state, staging / "mm_projector.bin")
        write_files(staging, {"config.json": config})
        write_sums(staging, {})
    return {"folder": str(save), "layout": "mm_projector.bin", "tensors": len(state), "files": ["config.json"]} | {
        "notes": original.notes_of(config)
    }
