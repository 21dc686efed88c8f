"""A Megatron checkpoint as named tensors, for conversions: opening one, and writing a new one."""

import math
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava import __version__
from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
from megatron_moellava.checkpoint.folders import (
    complete_iterations,
    iteration_folder,
    require_checkpoint,
    write_tracker,
)
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.readers import open_megatron
from megatron_moellava.conversion.recipes import Part, Recipe, Tensors, check
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.conversion.writers import Progress, staged, write_megatron
from megatron_moellava.costs.adapters import PREFIX as ADAPTERS
from megatron_moellava.costs.shapes import (
    LANGUAGE,
    PROJECTOR,
    TOWER,
    UNUSED,
    Model,
    megatron_tensors,
    model_from_json,
)
from megatron_moellava.towers.branches import PREFIX as MODALITY


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An opened Megatron checkpoint: the model's tensors, without optimizer states."""

    folder: Path
    model: Model
    tensors: dict[str, Tensor]
    run: RunDescription
    verified: bool = True  # False: the caller did without


def open_checkpoint(
    path: Path, *, verify: bool = True, verified: bool = False, adapter: bool = False, stored_as: str = ""
) -> Checkpoint:
    """Open the newest complete checkpoint of a folder, after its files have been verified; weights stay in the files.

    `verify`: False when the user does without. `verified`: that has been done in this process. `adapter`: an adapter
    checkpoint will do as well; without it that is a CheckpointError. `stored_as`: a prefix under which the checkpoint has
    other tensors of the same names, which are opened instead of the weights.
    """
    folder = require_checkpoint(path)
    run = read_description(folder) if verified else verify_checkpoint(folder, verify=verify)
    if run.adapter is not None and not adapter:
        raise CheckpointError(f"{folder} is an adapter and no whole model; join it to its base: moellava convert merge")
    prefixes = (LANGUAGE, TOWER, PROJECTOR, ADAPTERS, MODALITY)
    tensors = {
        name: tensor
        for stored, tensor in open_megatron(folder).items()
        if stored.startswith(stored_as) and (name := stored.removeprefix(stored_as)).startswith(prefixes)
        if "_extra_state" not in name
    }
    model = model_from_json(run.model)
    return Checkpoint(folder=folder, model=model, tensors=_unpadded(tensors, model), run=run, verified=verify)


def _unpadded(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Training may have padded the vocabulary for tensor parallelism: only the model's own rows are looked at."""
    vocab = model.backbone.vocab_size
    trimmed = {}
    for name, tensor in tensors.items():
        if name.startswith((f"{LANGUAGE}embedding.", f"{LANGUAGE}output_layer.")) and tensor.shape[0] > vocab:
            tensor = _first_rows(tensor, vocab)
        trimmed[name] = tensor
    return trimmed


def _first_rows(tensor: Tensor, rows: int) -> Tensor:
    tiles = tuple(
        type(tile)(tile.path, tile.offset, (tile.rows[0], min(tile.rows[1], rows)), tile.columns)
        for tile in tensor.tiles
        if tile.rows[0] < rows
    )
    return Tensor((rows, *tensor.shape[1:]), tensor.dtype, tiles)


def check_complete(source: Checkpoint) -> None:
    """CheckpointError unless every tensor of the model is there, whole, in its shape, and no other (but what rides along)."""
    own = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(UNUSED)}
    wanted = megatron_tensors(source.model)
    recipes = [Recipe(key, shape, "", (Part(key, 0, math.prod(shape)),)) for key, shape in wanted.items()]
    check(recipes, own, what=str(source.folder), expected=wanted)


def write_checkpoint(
    save: Path,
    model: Model,
    recipes: list[Recipe],
    tensors: Tensors,
    *,
    stage: int,
    provenance: dict,
    progress: Progress,
    adapter: dict | None = None,
) -> Path:
    """Write SAVE/iter_0000000 and return it. `provenance` says where the weights come from; `adapter`:
    see RunDescription.

    Raises CheckpointError where SAVE holds a run: what reads it would take the new checkpoint for its newest.
    """
    folder = iteration_folder(save, 0)
    if others := [path.name for path in complete_iterations(Path(save)) if path != folder]:
        raise CheckpointError(
            f"{save} holds a run ({', '.join(others)}), whose place {folder.name} would take; choose another --save"
        )
    with staged(folder) as staging:
        description = RunDescription(
            iteration=0,
            stage=stage,
            model=model.to_json(),
            provenance={**provenance, "version": __version__},
            adapter=adapter,
            sha256=write_megatron(staging, recipes, tensors, progress),
        )
        write_description(staging, description)
    write_tracker(Path(save), 0)
    return folder
