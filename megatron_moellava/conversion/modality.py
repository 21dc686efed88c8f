"""A modality gets a tower, a projector, or both of its own: a Megatron checkpoint in, a Megatron checkpoint out.

The weights of a tower are a published one's, or a copy of the model's own; a projector is drawn anew, or copied. Copies of both
compute what was computed before, and learn other things from there on.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_moellava.checkpoint.description import converted
from megatron_moellava.checkpoint.sums import verify_sums
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.imports import BUFFERS, OTHER_HALF, TOWER_FILE, is_unused, tower_file
from megatron_moellava.conversion.initial import language_dtype, linear_default
from megatron_moellava.conversion.layout import VISION_TOWER, tower_entries
from megatron_moellava.conversion.megatron_checkpoint import (
    Checkpoint,
    check_complete,
    open_checkpoint,
    write_checkpoint,
)
from megatron_moellava.conversion.recipes import Recipe, check, identity, import_recipes
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.shapes import OWN_TOWER, PROJECTOR, TOWER, UNUSED, Model, branch_tensors
from megatron_moellava.towers import Tower, get_tower, without_rule
from megatron_moellava.towers.branches import Branch
from megatron_moellava.validation.modalities import NAME, grids_apart, projector_fits

Start = Literal["shared", "new", "copy"]  # how a projector begins: there is none of its own, drawn anew, the model's


def add_modality(
    checkpoint: Path,
    *,
    save: Path,
    modality: str,
    tower: str | None = None,
    copy_tower: bool = False,
    projector: Start = "new",
    seed: int = 0,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Write `checkpoint` with a branch for `modality` under `save`; returns a report that run.json keeps as provenance.

    `tower`: a folder with a published tower's weights; `copy_tower`: the model's own in its place; neither: none of its own.
    `seed`: of a new projector. Raises ConfigError or CheckpointError that list every problem, before anything is written.
    """
    source = open_checkpoint(checkpoint, verify=verify)
    check_complete(source)
    folder = Path(without_rule(tower)).expanduser() if tower else None
    if folder is not None and folder.exists():
        verify_sums(folder, verify=verify)
    branch = _branch(source, modality, tower, copy_tower, projector)
    model = replace(source.model, branches=(*source.model.branches, branch))
    tensors = dict(source.tensors)
    recipes = [identity(name, tensor) for name, tensor in source.tensors.items()]
    if copy_tower:
        recipes += _copies(source, TOWER, f"{branch.prefix}{OWN_TOWER}")
    elif tower:
        recipes += _tower_recipes(source, branch, Path(without_rule(tower)).expanduser(), tensors)
    if projector == "copy":
        recipes += _copies(source, PROJECTOR, f"{branch.prefix}{PROJECTOR}")
    elif projector == "new":
        recipes += _new_projector(model, branch, tensors, seed)
    check(recipes, tensors, what=str(source.folder), copies=True, dropped=_left_out(tensors, branch))
    provenance = converted(
        source.run,
        "add-modality",
        source=source.folder.name,
        modality=modality,
        tower="copy" if copy_tower else folder.name if folder else None,
        projector=projector,
        seed=seed,
    )
    provenance |= {} if source.verified else {"source_verified": False}
    begin(sum(recipe.nbytes for recipe in recipes))
    stage = 0 if source.run.stage is None else source.run.stage
    written = write_checkpoint(save, model, recipes, tensors, stage=stage, provenance=provenance, progress=progress)
    return {"folder": str(written), "model": model, "tensors": len(recipes), "branch": branch, **provenance}


def check_no_branches(model: Model, what: str) -> None:
    """No published class has a second tower beside the first, or a projector for some of the pictures."""
    if model.branches:
        names = ", ".join(branch.modality for branch in model.branches)
        raise ConfigError(
            f"data.modalities: {what} has one tower and one projector, and this model has others for {names}; export --layout "
            "language-model, tower and projector for the parts of plain pictures, or serve the checkpoint: moellava serve"
        )


def _branch(source: Checkpoint, modality: str, tower: str | None, copy_tower: bool, projector: Start) -> Branch:
    """Raises ConfigError for what does not fit to the model."""
    main = source.model.tower
    if main is None:
        raise ConfigError(f"{source.folder} is a language model alone; import it with a --tower first")
    if not NAME.fullmatch(modality):
        raise ConfigError(f"--modality {modality!r} must be lower-case letters, digits and underscores, such as depth")
    if any(branch.modality == modality for branch in source.model.branches):
        raise ConfigError(f"{source.folder} has something of its own for {modality} already; choose another --modality")
    if tower and copy_tower:
        raise ConfigError("--tower and --copy-tower are two starts of one tower; give one of them")
    if not tower and not copy_tower and projector == "shared":
        raise ConfigError(
            f"{modality} would have nothing of its own; give --tower, --copy-tower, or --projector new or copy"
        )
    own: Tower | None = main if copy_tower else get_tower(tower) if tower else None
    branch = Branch(modality=modality, tower=own, own_projector=projector != "shared")
    seen = branch.seen_by(main)
    if seen.has_grids:
        raise ConfigError(grids_apart(seen))
    if seen.takes_videos:
        raise ConfigError(f"{seen.name} takes whole videos, and a modality has pictures; give it a tower for pictures")
    if projector in ("shared", "copy") and not projector_fits(seen, main):
        raise ConfigError(
            f"--projector {projector}: the features of {seen.name} are {seen.projector_input_size} wide, and those of "
            f"{main.name} {main.projector_input_size}; use --projector new"
        )
    return branch


def _copies(source: Checkpoint, ours: str, target: str) -> list[Recipe]:
    return [
        identity(name, tensor, target + name.removeprefix(ours))
        for name, tensor in source.tensors.items()
        if name.startswith(ours) and not name.startswith(UNUSED)
    ]


def _tower_recipes(source: Checkpoint, branch: Branch, folder: Path, tensors: dict[str, Tensor]) -> list[Recipe]:
    """A published tower's tensors, in the type of the model's; they are added to `tensors`."""
    if not folder.exists():
        raise ConfigError(
            f"--tower {folder}: a name has no weights; give a folder with config.json and safetensors or .bin"
        )
    tensors |= tower_file(folder)
    dtype = next(tensor.dtype for name, tensor in source.tensors.items() if name.startswith(TOWER))
    alone = Model(backbone=source.model.backbone, tower=branch.tower)
    lines = tower_entries(alone, replace(VISION_TOWER, tower=TOWER_FILE))
    missing = [name for line in lines for name in line.names if name not in tensors]
    if missing:
        shown = ", ".join(name.removeprefix(TOWER_FILE) for name in missing[:3])
        raise ConfigError(f"--tower {folder} lacks {len(missing)} tensors of {alone.required_tower.name}: {shown}, ...")
    target = f"{branch.prefix}{OWN_TOWER}"
    return [
        replace(recipe, name=target + recipe.name.removeprefix(TOWER))
        for recipe in import_recipes(lines, tensors, dtype)
    ]


def _new_projector(model: Model, branch: Branch, tensors: dict[str, Tensor], seed: int) -> list[Recipe]:
    """As torch's Linear default, each tensor by its own name; they are added to `tensors`."""
    shapes = {name: item.shape for name, item in branch_tensors(model, branch).items() if item.role == "projector"}
    dtype = language_dtype(tensors)
    for name, shape in shapes.items():
        fan_in = shapes[name.rpartition(".")[0] + ".weight"][-1]
        tensors[name] = linear_default(name, shape, fan_in, dtype, seed)
    return [identity(name, tensors[name]) for name in shapes]


def _left_out(tensors: dict[str, Tensor], branch: Branch) -> list[str]:
    """Of a published tower: what no feature needs."""
    return [
        name
        for name in tensors
        if name.startswith(TOWER_FILE)
        and (
            name.endswith(BUFFERS)
            or name.removeprefix(TOWER_FILE).startswith(OTHER_HALF)
            or is_unused(name.removeprefix(TOWER_FILE), branch.tower)
        )
    ]
