"""The folder of a run: what lies where, which checkpoints in it are complete, and which one is meant.

SAVE/latest_checkpointed_iteration.txt
SAVE/iter_0000100/  .metadata, *.distcp   tensors by global name, any layout loads them
                    run.json              the model and the run; a folder without it is incomplete
"""

from pathlib import Path

from megatron_moellava.config import CheckpointError

RUN_FILE = "run.json"
TRACKER = "latest_checkpointed_iteration.txt"


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete iteration folder below `folder`, or `folder` itself if it is one; None if there is none."""
    folder = Path(folder)
    if (folder / RUN_FILE).exists():
        return folder
    return max(complete_iterations(folder), default=None)


def require_checkpoint(folder: str | Path) -> Path:
    """`newest_checkpoint`, or CheckpointError that says what is there instead."""
    found = newest_checkpoint(folder)
    if found is not None:
        return found
    raise CheckpointError(
        f"checkpoint.load={folder} holds no complete checkpoint (a folder iter_*/ with {RUN_FILE}); "
        + ("make one with tools/convert.py" if Path(folder).exists() else "the folder does not exist")
    )


def complete_iterations(folder: Path) -> list[Path]:
    """Complete iteration folders, oldest first; whether their files are still what was written is not looked at.

    An interrupted save leaves iter_*.tmp, a damaged checkpoint is kept as iter_*.damaged; both may have a run.json.
    """
    return sorted(file.parent for file in folder.glob(f"iter_*/{RUN_FILE}") if not file.parent.suffix)
