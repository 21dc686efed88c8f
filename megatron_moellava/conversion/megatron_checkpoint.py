"""Megatron checkpoint folders: finding one, reading what it says of itself, writing a new one.

`SAVE/iter_0000000/run.json` is written last, after the rename: a folder with it is complete.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava import __version__
from megatron_moellava.checkpoint.description import FORMAT
from megatron_moellava.checkpoint.folders import TRACKER, complete_iterations
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion.readers import open_megatron
from megatron_moellava.conversion.recipes import Part, Recipe, Tensors, check
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.conversion.writers import Progress, staged, write_megatron
from megatron_moellava.costs.shapes import (
    LANGUAGE,
    PROJECTOR,
    TOWER,
    UNUSED,
    Model,
    megatron_tensors,
    model_from_json,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An opened Megatron checkpoint: the model's tensors, without optimizer states."""

    folder: Path
    model: Model
    tensors: dict[str, Tensor]
    run: dict  # run.json

    @property
    def provenance(self) -> dict:
        return self.run.get("provenance") or {}


def find_iteration(path: Path) -> Path:
    """The iter_ folder that `path` means: itself, or the newest complete one of a run's folder."""
    path = Path(path)
    if (path / "run.json").exists():
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint folder")
    complete = complete_iterations(path)
    if complete:
        return complete[-1]
    raise CheckpointError(f"{path} holds no complete checkpoint (iter_*/run.json); give the folder of a finished save")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the newest complete checkpoint of a folder; nothing is read but names and shapes."""
    folder = find_iteration(path)
    try:
        run = json.loads((folder / "run.json").read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / 'run.json'} is damaged ({error}); restore the checkpoint") from None
    if run.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: run.json format={run.get('format')!r}, this version reads {FORMAT}; upgrade")
    prefixes = (LANGUAGE, TOWER, PROJECTOR)
    tensors = {
        name: tensor
        for name, tensor in open_megatron(folder).items()
        if name.startswith(prefixes) and "_extra_state" not in name
    }
    return Checkpoint(folder=folder, model=model_from_json(run["model"]), tensors=_unpadded(tensors, run), run=run)


def _unpadded(tensors: dict[str, Tensor], run: dict) -> dict[str, Tensor]:
    """Training may have padded the vocabulary for tensor parallelism: only the model's own rows are looked at."""
    vocab = run["model"].get("backbone_fields", {}).get("vocab_size")
    trimmed = {}
    for name, tensor in tensors.items():
        if vocab and name.startswith((f"{LANGUAGE}embedding.", f"{LANGUAGE}output_layer.")) and tensor.shape[0] > vocab:
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
    moe = source.model.moe
    if moe and moe.moe_shared_expert_intermediate_size:
        raise ConfigError(
            "moe.moe_shared_expert_intermediate_size: checkpoints with a shared expert cannot be converted"
        )
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
) -> Path:
    """Write SAVE/iter_0000000 and return it. `provenance` says where the weights come from."""
    folder = Path(save) / "iter_0000000"
    with staged(folder) as staging:
        write_megatron(staging, recipes, tensors, progress)
    run = {
        "format": FORMAT,
        "iteration": 0,
        "stage": stage,
        "model": model.to_json(),
        "config": None,
        "provenance": {**provenance, "version": __version__},
    }
    write_last(folder / "run.json", json.dumps(run, indent=2) + "\n")
    write_last(Path(save) / TRACKER, "0\n")
    return folder


def write_last(path: Path, text: str) -> None:
    """Write a small file that is either the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
