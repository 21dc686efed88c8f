"""A checkpoint as training leaves it, with optimizer and generators, and every way in which a copy of it may be damaged."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import RUN_FILE
from megatron_moellava.config import ParallelConfig
from megatron_moellava.conversion.readers import open_megatron
from megatron_moellava.model.build import build_model
from megatron_moellava.model.roles import freeze
from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint
from megatron_moellava.training.optimizer import build_optimizer, wrap_data_parallel
from tests.helpers.inference_models import GATES, tiny_run

WEIGHT = "language_model.decoder.layers.1.self_attention.linear_proj.weight"


def trained_checkpoint(save: Path, gate: str = "megatron") -> Path:
    """SAVE/iter_0000002 with everything that a stage's training writes. The process groups exist meanwhile, and no longer."""
    parallel.initialize(ParallelConfig(), seed=1)
    run = tiny_run(GATES[gate])
    run = replace(run, optimizer=replace(run.optimizer, lr=1e-3))
    chunks = build_model(run)
    freeze(chunks[0], ("projector", "language.attention"))
    optimizer = build_optimizer(run, wrap_data_parallel(run, chunks))
    state = TrainingState(iteration=2, consumed_samples=8, data={"position": 3})
    folder = save_checkpoint(save, run, chunks, state, optimizer)
    parallel.shutdown()
    return folder


def flip(path: Path, position: int) -> Path:
    """Flip the lowest bit of a byte."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    return path


def flip_in_tensor(folder: Path, begins: str) -> Path:
    """Flip a bit of a value of the first tensor whose name begins so."""
    tensors = open_megatron(folder)
    tile = next(tensor.tiles[0] for name, tensor in sorted(tensors.items()) if name.startswith(begins) and tensor.tiles)
    return flip(Path(tile.path), tile.offset)


def largest(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> Path:
    path = largest(folder)
    os.truncate(path, path.stat().st_size // 2)
    return path


def empty(path: Path) -> Path:
    os.truncate(path, 0)
    return path


def remove(path: Path) -> Path:
    path.unlink()
    return path


def swap(folder: Path) -> Path:
    """Exchange two files: each is sound, and in the wrong place."""
    one, two = folder / "ranks/generators_00000.pt", folder / "ranks/data_00000.pt"
    aside = one.rename(folder / "aside")
    two.rename(one)
    aside.rename(two)
    return one


def edit(folder: Path) -> Path:
    """Change a number that no tensor's shape depends on."""
    path = folder / RUN_FILE
    before = path.read_text()
    after = before.replace('"rotary_base": 10000.0', '"rotary_base": 5000.0')
    assert after != before
    path.write_text(after)
    return path


def overwrite(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def half_of(path: Path) -> Path:
    return overwrite(path, path.read_text()[:200])


Damage = Callable[[Path], Path]  # damages an iteration folder, returns the file that must be named
# What an interrupted copy, a full disk or a hand leaves: seen without digests, too.
TORN: dict[str, Damage] = {
    "truncated shard": truncate,
    "emptied shard": lambda folder: empty(largest(folder)),
    "missing shard": lambda folder: remove(largest(folder)),
    "missing .metadata": lambda folder: remove(folder / ".metadata"),
    "emptied .metadata": lambda folder: empty(folder / ".metadata"),
    "emptied run.json": lambda folder: empty(folder / RUN_FILE),
    "half of run.json": lambda folder: half_of(folder / RUN_FILE),
    "run.json of another kind": lambda folder: overwrite(folder / RUN_FILE, "[1, 2]"),
}
DAMAGE: dict[str, Damage] = TORN | {
    "bit in the weights": lambda folder: flip_in_tensor(folder, WEIGHT),
    "bit in the optimizer": lambda folder: flip_in_tensor(folder, "optimizer."),
    "bit in the generators": lambda folder: flip(folder / "ranks/generators_00000.pt", 1000),
    "bit in the data position": lambda folder: flip(folder / "ranks/data_00000.pt", 200),
    "bit in .metadata": lambda folder: flip(folder / ".metadata", 300),
    "edited run.json": edit,
    "exchanged files": swap,
    "missing generators": lambda folder: remove(folder / "ranks/generators_00000.pt"),
    "missing metadata.json": lambda folder: remove(folder / "metadata.json"),
}


def forget_digests(folder: Path) -> None:
    """As versions before digests wrote it."""
    path = folder / RUN_FILE
    description = json.loads(path.read_text())
    del description["sha256"], description["checksum"]
    path.write_text(json.dumps(description))
