"""The folder of a run: what lies where, which checkpoints in it are complete, and which one is meant.

SAVE/latest_checkpointed_iteration.txt
SAVE/iter_0000100/          .metadata, *.distcp   tensors by global name, any layout loads them
                            ranks/                what a training run needs to go on, by rank
                            run.json              the model and the run; written last, a folder without it is incomplete
SAVE/iter_0000100.tmp       an unfinished save
SAVE/iter_0000100.damaged   a checkpoint whose files are no longer what was written, set aside by training
SAVE/iter_0000100.superseded  a checkpoint that the run has gone back behind, set aside by training
"""

import os
from pathlib import Path

from megatron_moellava.config import CheckpointError

RUN_FILE = "run.json"
TRACKER = "latest_checkpointed_iteration.txt"
OPTIMIZER_STATE = "optimizer.state."  # + kind of state + "." + name of the weight: a tensor of the optimizer
AVERAGE = "ema"  # kind: the averaged weights (optimizer.ema_decay)
AVERAGES = f"{OPTIMIZER_STATE}{AVERAGE}."
UNFINISHED, DAMAGED, SUPERSEDED = ".tmp", ".damaged", ".superseded"


def iteration_folder(save: str | Path, iteration: int) -> Path:
    """The folder of one checkpoint of a run."""
    return Path(save) / f"iter_{iteration:07d}"


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete iteration folder below `folder`, or `folder` itself if it is one; None if there is none.

    The one that latest_checkpointed_iteration.txt names, where somebody has written an older step into it.
    """
    folder = Path(folder)
    if (folder / RUN_FILE).exists():
        return folder
    complete = complete_iterations(folder)
    named = read_tracker(folder) or ""
    chosen = iteration_folder(folder, int(named)) if named.isdecimal() else None
    return chosen if chosen in complete else max(complete, default=None)


def require_checkpoint(folder: str | Path) -> Path:
    """`newest_checkpoint`, or CheckpointError that says what is there instead."""
    found = newest_checkpoint(folder)
    if found is not None:
        return found
    folder = Path(folder)
    halves = sorted(path.name for path in (folder, *folder.glob("iter_*")) if path.name.startswith("iter_"))
    if not folder.exists():
        hint = "the folder does not exist"
    elif halves:
        hint = f"{', '.join(halves)}: the save or the copy was interrupted, copy it anew"
    else:
        hint = "make one with moellava convert"
    raise CheckpointError(f"{folder} holds no complete checkpoint (a folder iter_*/ with {RUN_FILE}); {hint}")


def complete_iterations(folder: Path) -> list[Path]:
    """Complete iteration folders, oldest first; whether their files are still what was written is not looked at.

    An interrupted save leaves iter_*.tmp, a damaged checkpoint is kept as iter_*.damaged; both may have a run.json.
    """
    return sorted(file.parent for file in folder.glob(f"iter_*/{RUN_FILE}") if not file.parent.suffix)


def passed_over(checkpoint: Path) -> list[Path]:
    """Newer complete checkpoints that are not meant, because somebody has written `checkpoint`'s step into the tracker file."""
    newer = [path for path in complete_iterations(checkpoint.parent) if path.name > checkpoint.name]
    named = read_tracker(checkpoint.parent) or ""
    is_named = named.isdecimal() and iteration_folder(checkpoint.parent, int(named)) == checkpoint
    return newer if is_named else []


def write_tracker(save: Path, iteration: int) -> None:
    """Note the newest iteration, as Megatron-LM does.

    Before the iteration gets its name: a job that dies in between leaves a step that is not there, which is passed over,
    and not an older one, which is how users go back.
    """
    write_durably(save / TRACKER, f"{iteration}\n".encode())


def read_tracker(save: Path) -> str | None:
    """What latest_checkpointed_iteration.txt says, which users edit; None where there is none."""
    try:
        return (save / TRACKER).read_text(errors="replace").strip()
    except OSError:
        return None


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file that is either the old one or the new one, never half of it, and lies on the disk itself.

    What lies only in memory is lost when the node dies.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
