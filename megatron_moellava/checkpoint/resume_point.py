"""Which checkpoint of its own folder a run goes on from: the newest, unless the user goes back.

There are two ways back, both Megatron-LM's: `checkpoint.ckpt_step`, and an older step written into
latest_checkpointed_iteration.txt. The newer checkpoints are set aside then, so that a folder holds one line of a run.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.checkpoint.description import RunDescription, read_description
from megatron_moellava.checkpoint.folders import (
    SUPERSEDED,
    TRACKER,
    complete_iterations,
    iteration_folder,
    read_tracker,
)
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.config import CheckpointError


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Checkpoints to try in this order (a damaged one is passed over), those that are given up, and what to say."""

    candidates: list[Path]
    superseded: list[Path]
    note: str


def resume_point(save: str | Path, ckpt_step: int | None = None) -> ResumePoint:
    """Of the run in the folder `save`. CheckpointError when `ckpt_step` is no complete checkpoint there."""
    complete = complete_iterations(Path(save))[::-1]
    if ckpt_step is not None:
        return _asked(Path(save), complete, ckpt_step)
    named = read_tracker(Path(save))
    if named is None or not complete:
        return ResumePoint(complete, [], "")
    chosen = iteration_folder(save, int(named)) if named.isdecimal() else None
    if chosen not in complete:
        missing = f"{TRACKER} names {named[:40]!r}, of which there is no complete checkpoint"
        return ResumePoint(complete, [], f"{missing}; the newest is {complete[0].name}")
    return _back_to(chosen, complete, f"{TRACKER} names step {named}")


def newest_described(save: str | Path, ckpt_step: int | None = None) -> tuple[Path, RunDescription] | None:
    """The checkpoint that a run in the folder `save` goes on from, so far as run.json tells; None: it starts.

    Training sets damaged checkpoints aside and takes the one before.
    """
    for checkpoint in resume_point(save, ckpt_step).candidates:
        with contextlib.suppress(DamagedCheckpoint):
            return checkpoint, read_description(checkpoint)
    return None


def _asked(save: Path, complete: list[Path], step: int) -> ResumePoint:
    chosen = iteration_folder(save, step)
    made = [path for path in complete if path.name > chosen.name]
    if _continues(made, step):  # the same command once more, after an interruption
        note = (
            f"checkpoint.ckpt_step={step}: this command went back before, and goes on with what it has made since; to go back "
            f"once more, write {step} into {TRACKER} and leave checkpoint.ckpt_step out"
        )
        return ResumePoint([*made, *(path for path in complete if path == chosen)], [], note)
    if chosen not in complete:
        steps = ", ".join(str(int(path.name.removeprefix("iter_"))) for path in reversed(complete)) or "none"
        raise CheckpointError(
            f"checkpoint.ckpt_step={step}: {save} holds no complete checkpoint of that step (complete: {steps}); choose one "
            "of these, or leave checkpoint.ckpt_step out"
        )
    point = _back_to(chosen, complete, f"checkpoint.ckpt_step={step}")
    return ResumePoint([chosen], point.superseded, point.note)


def _back_to(chosen: Path, complete: list[Path], why: str) -> ResumePoint:
    newer = [path for path in complete if path.name > chosen.name]
    note = ""
    if newer:
        names = ", ".join(path.name for path in reversed(newer))
        note = f"{why}: goes on from there; {names} set aside as *{SUPERSEDED}, to be deleted by hand"
    return ResumePoint([path for path in complete if path not in newer], newer, note)


def _continues(newer: list[Path], step: int) -> bool:
    """Whether the newest was made by a run that had gone back to `step`."""
    for checkpoint in newer:
        with contextlib.suppress(DamagedCheckpoint):
            config = read_description(checkpoint).config or {}
            return config.get("checkpoint", {}).get("ckpt_step") == step
    return False
