"""Any checkpoint from outside -> a Megatron checkpoint. The layout is told from the tensors' names.

A language model and a tower make the start of stage 1; a `mm_projector.bin` with them is what stage 1 made; LLaVA-1.5
and MoE-LLaVA folders hold everything, or everything but the tower.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_moellava.backbones import BACKBONES, Backbone
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.checkpoint.sums import verify_sums
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion import huggingface, original
from megatron_moellava.conversion.dequantised import dequantised
from megatron_moellava.conversion.huggingface import NO_SHARED_EXPERT
from megatron_moellava.conversion.initial import new_projector
from megatron_moellava.conversion.layout import (
    LANGUAGE_MODEL,
    LLAVA,
    NATIVE,
    NEWLINE,
    ORIGINAL,
    TRANSFORMERS,
    Layout,
    entries,
)
from megatron_moellava.conversion.megatron_checkpoint import write_checkpoint
from megatron_moellava.conversion.readers import open_huggingface
from megatron_moellava.conversion.recipes import Recipe, check, identity, import_recipes, made
from megatron_moellava.conversion.tensors import Files, Tensor
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.shapes import PROJECTOR, UNUSED, Model
from megatron_moellava.hf_config import read_json
from megatron_moellava.towers import without_rule

# Constants that older versions of transformers saved with the weights, and the halves of CLIP and SigLIP that are not
# the vision tower. They are left out, and counted in the report.
BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids", "self_attn.bias", "self_attn.masked_bias")
OTHER_HALF = ("text_model.", "logit_scale", "logit_bias", "visual_projection.", "text_projection.")
TOWER_FILE, PROJECTOR_FILE = "tower file: ", "projector file: "  # put before names, so that files cannot clash


@dataclass(slots=True)
class Import:
    """What one import reads, and what it decided; `report` is for the user and for run.json."""

    layout: Layout
    tensors: dict[str, Tensor]
    report: dict = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def drop(self, names, why: str) -> None:
        """Note that tensors are left out, and why; each name is reported once."""
        names = sorted(set(names) - self.dropped)
        if names:
            self.dropped |= set(names)
            self.report.setdefault("dropped", {})[why] = names


def import_checkpoint(
    source: Path,
    *,
    save: Path,
    tower: str | None = None,
    projector: Path | None = None,
    dtype: str | None = None,
    seed: int = 0,
    keep_output_bias: bool = False,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Convert `source` into a Megatron checkpoint under `save`; returns the report that run.json keeps as provenance.

    `tower`: a folder with the tower's weights; or, when `source` has the weights, a name or folder that defines it.
    `projector`: a mm_projector file; without one, and without one in `source`, a new projector is drawn with `seed`.
    `verify`: compare what is read with a SHA256SUMS file where one lies beside it.
    Raises ConfigError or CheckpointError that list every problem, before anything is written.
    """
    source = Path(source)
    if source.is_dir() and newest_checkpoint(source) is not None:
        raise CheckpointError(
            f"{source} is a Megatron checkpoint already: pass it to --load, `convert upcycle` or `export`"
        )
    files = (without_rule(tower) if tower else None, projector)
    for path in (source, *(Path(other).expanduser() for other in files if other)):
        verify_sums(path, verify=verify)
    plan = _plan(source, tower, projector, dtype, seed, keep_output_bias)
    job, model, recipes, config = plan.job, plan.model, plan.recipes, plan.config
    provenance = {"operation": "import", "layout": job.layout.name, "source": source.name, **job.report}
    provenance["hf_config"] = config
    provenance["generation_config"] = _generation_config(source)
    provenance["trained_with"] = original.trained_with(
        config | {"trained_with": plan.said}, job.layout, model, plan.by_the_original
    )
    begin(sum(recipe.nbytes for recipe in recipes))
    stage = 3 if model.moe and model.backbone.moe is None else plan.stage
    folder = write_checkpoint(save, model, recipes, job.tensors, stage=stage, provenance=provenance, progress=progress)
    return {"folder": str(folder), "stage": stage, "model": model, "tensors": len(recipes), **provenance}


def as_megatron(source: Path, tower: str | None) -> dict[str, Tensor]:
    """The tensors of a folder as an import of it would write them: Megatron's names and pieces, read when they are needed.

    `tower`: a name or folder that defines the tower, where the folder's config does not.

    Raises ConfigError or CheckpointError where it cannot be imported as it is (without a tower, ...).
    """
    plan = _plan(source, tower, None, None, 0, False)
    return {
        recipe.name: Tensor(recipe.shape, recipe.dtype, make=partial(made, recipe, plan.job.tensors))
        for recipe in plan.recipes
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """How a source becomes a Megatron checkpoint; `by_the_original`, `said`: see `_training_of`."""

    job: Import
    model: Model
    recipes: list[Recipe]
    config: dict
    stage: int
    by_the_original: bool
    said: dict


def _plan(
    source: Path, tower: str | None, projector: Path | None, dtype: str | None, seed: int, keep_output_bias: bool
) -> Plan:
    config = read_json(source)
    if config.get("model_type") == huggingface.OWN_TYPE:
        raise ConfigError(
            f"{source} is an export with a modelling file, for transformers alone (model_type {huggingface.OWN_TYPE}); export "
            "the checkpoint with --layout original, which can be imported"
        )
    tensors, config, stored = dequantised(open_huggingface(source), config, source)
    job = Import(detect(tensors), tensors, {"dequantised": stored} if stored else {})
    job.tensors = _renamed(job.tensors, job.layout)
    backbone = _backbone(config, source, job, keep_output_bias)
    moe = original.moe_config(config) or huggingface.moe_config(config, backbone)
    seen = original.tower_of(config, job.layout, tower)
    by_the_original, said = _training_of(job, projector, config)
    if seen and by_the_original and not said.get("tower"):
        seen = original.as_the_original(seen)
    model = Model(backbone=backbone, tower=seen, moe=moe)
    layout, stage = _add_tower_and_projector(job, model, tower, projector, seed)
    lines = entries(model, layout)
    riding = [replace(recipe, dtype=dtype or recipe.dtype) for recipe in _riding(job, model, layout)]
    recipes = import_recipes(lines, job.tensors, dtype) + riding
    _drop_inert(job, model, layout)
    _drop_layers_ahead(job, model, layout, config)
    check(
        recipes,
        job.tensors,
        what=f"{source} ({job.layout.title})",
        expected={name: shape for entry in lines for name, shape in zip(entry.names, entry.shapes, strict=True)},
        dropped=job.dropped,
    )
    return Plan(job, model, recipes, config, stage, by_the_original, said)


def _generation_config(source: Path) -> dict | None:
    """`generation_config.json` of the source, for its exports; None: it has none."""
    file = (source if source.is_dir() else source.parent) / "generation_config.json"
    return read_json(file) if file.exists() else None


def _training_of(job: Import, projector: Path | None, config: dict) -> tuple[bool, dict]:
    """(whether MoE-LLaVA's rules trained the projector, as its names say; what the config of an export says beyond)."""
    if projector is None:
        return job.layout is ORIGINAL, original.said_of(config)
    beside = Path(projector).parent / "config.json"
    said = original.said_of(read_json(beside)) if beside.exists() else {}
    if job.layout is LANGUAGE_MODEL:  # the projector says how pictures were shown, the language model how it was asked
        for section, fields in original.said_of(config).items():
            said[section] = said.get(section, {}) | fields
    return detect(open_huggingface(Path(projector))) is ORIGINAL, said


def detect(tensors: Mapping[str, Tensor]) -> Layout:
    """Which layout the names belong to."""
    marks = (
        (ORIGINAL, ("mm_projector.image_spatial_proj.", ".image_tower.", "deepspeed_moe.")),
        (LLAVA, ("mm_projector.", "model.vision_tower.vision_tower.")),
        (NATIVE, ("model.multi_modal_projector.",)),
        (TRANSFORMERS, ("multi_modal_projector.",)),
    )
    for layout, parts in marks:
        if any(part in name for name in tensors for part in parts):
            return layout
    return LANGUAGE_MODEL


def _renamed(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """transformers 5 leaves "vision_model." out where version 4 and the published checkpoints have it."""
    if layout is NATIVE:
        return {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in tensors.items()}
    if layout is not TRANSFORMERS:
        return tensors
    missing, full = "vision_tower.", "vision_tower.vision_model."
    return {
        full + name.removeprefix(missing) if name.startswith(missing) and not name.startswith(full) else name: tensor
        for name, tensor in tensors.items()
    }


def _backbone(config: dict, source: Path, job: Import, keep_output_bias: bool) -> Backbone:
    """From the text part of the config; the name of a published size when it is one."""
    backbone = named(huggingface.text_backbone(config, source.name), source.name)
    if keep_output_bias:
        return replace(backbone, output_layer_bias=True)
    prefix = job.layout.language
    job.drop(
        (prefix + name for name in backbone.hf.drops if prefix + name in job.tensors),
        "the original has no such tensor (import with --keep-output-bias to have it)",
    )
    return backbone


def named(backbone: Backbone, hint: str) -> Backbone:
    """The registry's backbone with the same numbers, preferably one whose name is in `hint` (a folder's name)."""
    twins = [
        other
        for other in BACKBONES.values()
        if replace(backbone, name=other.name, source=other.source, template=other.template) == other
    ]
    return max(twins, key=lambda twin: twin.name in hint.lower(), default=backbone)


def _add_tower_and_projector(
    job: Import, model: Model, tower: str | None, projector: Path | None, seed: int
) -> tuple[Layout, int]:
    """Bring the tensors of other files in, and say where the lines find them. Second result: the stage that is done."""
    layout, decoder = job.layout, model.backbone.hf.prefix
    if model.tower is None:
        return layout, 0
    has_tower = layout.tower and any(name.startswith(layout.tower.format(decoder=decoder)) for name in job.tensors)
    if not has_tower:
        folder = Path(without_rule(tower)).expanduser() if tower else None
        if folder is None or not folder.exists():
            raise ConfigError(
                f"{model.tower.name}: the source has no tower weights; give --tower a folder that has them"
            )
        layout = replace(layout, tower=TOWER_FILE)
        job.tensors = job.tensors | tower_file(folder)
    if projector:
        job.tensors = job.tensors | _projector_file(projector)
        layout = replace(layout, projector=(f"{PROJECTOR_FILE}0", f"{PROJECTOR_FILE}2"))
        layout = replace(layout, newline=PROJECTOR_FILE + NEWLINE)
        return layout, 1
    if layout.projector:
        return layout, 2
    job.tensors = job.tensors | new_projector(model, job.tensors, seed)
    job.report["projector"] = f"new, as torch's Linear default, seed {seed}"
    return replace(layout, projector=(f"{PROJECTOR}linear_fc1", f"{PROJECTOR}linear_fc2")), 0


def tower_file(folder: Path) -> dict[str, Tensor]:
    """A tower's tensors from a folder of its own, renamed so that they cannot collide with the language model's."""
    tensors = open_huggingface(folder)
    return {TOWER_FILE + name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}


def _projector_file(file: Path) -> dict[str, Tensor]:
    """`mm_projector.bin`: what follows "mm_projector." names the layer, whatever stands before."""
    tensors = {}
    for name, tensor in open_huggingface(file).items():
        tail = name.split("mm_projector.")[-1].removeprefix("image_spatial_proj.")
        tensors[PROJECTOR_FILE + tail] = tensor
    return tensors


def _riding(job: Import, model: Model, layout: Layout) -> list[Recipe]:
    """Tower tensors that no feature needs (the last layer, the pooling head) go along, so that an export is complete."""
    if model.tower is None:
        return []
    prefix = layout.tower.format(decoder=model.backbone.hf.prefix)
    recipes = []
    for name, tensor in job.tensors.items():
        rest = name.removeprefix(prefix)
        if rest != name and name not in job.dropped and is_unused(rest, model.tower):
            recipes.append(identity(name, tensor, UNUSED + rest))
    return recipes


def is_unused(name: str, tower) -> bool:
    """Whether a tower tensor (its name below "vision_model.") is needed by no feature."""
    for pattern in tower.unused:
        before, layered, _ = pattern.partition("{i}")
        if name.startswith(before):
            number = name.removeprefix(before).split(".")[0]
            if not layered or int(number) >= tower.num_used_layers:
                return True
    return False


def _drop_inert(job: Import, model: Model, layout: Layout) -> None:
    job.drop((name for name in job.tensors if name.endswith(BUFFERS)), "buffers that are computed, not learned")
    halves = tuple(TOWER_FILE + part for part in OTHER_HALF)
    job.drop((name for name in job.tensors if name.startswith(halves)), "not part of the vision tower")
    if model.moe is not None and not model.moe.moe_shared_expert_intermediate_size:
        _drop_empty_shared_experts(job)
    head, embedding = (
        next(m.hf[0] for m in model.backbone.mapping if m.megatron == key)
        for key in ("output_layer.weight", "embedding.word_embeddings.weight")
    )
    head, embedding = layout.language + head, layout.language + embedding
    if model.backbone.share_embeddings_and_output_weights and head in job.tensors:
        if not _equal(job.tensors[head], job.tensors[embedding]):
            raise CheckpointError(
                f"{head} differs from {embedding}, but tie_word_embeddings is true; set it to false in config.json"
            )
        job.drop([head], "tied to the embeddings")


def _drop_layers_ahead(job: Import, model: Model, layout: Layout, config: dict) -> None:
    """Layers that the config counts behind the last (`num_nextn_predict_layers`): transformers leaves them out as well."""
    first, text = model.backbone.num_layers, config.get("text_config") or config
    numbers = range(first, first + int(text.get("num_nextn_predict_layers") or 0))
    prefixes = tuple(f"{layout.language}{model.backbone.hf.prefix}layers.{number}." for number in numbers)
    job.drop((name for name in job.tensors if name.startswith(prefixes)), "they predict further tokens ahead (MTP)")


def _drop_empty_shared_experts(job: Import) -> None:
    """Of Qwen2-MoE's layout, which must have them: of no width, or zeros, so that their gate multiplies nothing.

    ConfigError for weights that compute something.
    """
    shared = [name for name in job.tensors if ".mlp.shared_expert." in name or ".mlp.shared_expert_gate." in name]
    with Files() as files:
        for name in shared:
            tensor = job.tensors[name]
            blocks = files.blocks(tensor, 0, tensor.numel)
            if ".mlp.shared_expert.down_proj." in name and any(any(block) for block in blocks):
                raise ConfigError(f"{name}: {NO_SHARED_EXPERT}")
    job.drop(shared, "empty shared experts")


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with Files() as files, Files() as others:
        left = files.blocks(one, 0, one.numel)
        right = others.blocks(other, 0, other.numel)
        return all(a == b for a, b in zip(left, right, strict=True))
