"""What a checkpoint says of itself: `run.json`, sealed by a checksum of its own content."""

import json
from pathlib import Path

from megatron_moellava.checkpoint.folders import RUN_FILE, newest_checkpoint
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint, check_seal, verify_files
from megatron_moellava.config import CheckpointError, current_names

FORMAT = 1


def read_run_file(checkpoint: Path) -> dict:
    """The `run.json` of an iteration folder; the fields of a run have today's names, whatever they had when it was written."""
    path = checkpoint / RUN_FILE
    try:
        description = json.loads(path.read_text())
        check_seal(path, description)
    except (ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}); copy it anew, or use another checkpoint") from None
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {description.get('format')}; this program reads format {FORMAT}"
        )
    if description.get("config"):
        description["config"] = current_names(description["config"])
    if description.get("model"):
        description["model"] = current_names(description["model"])
    return description


def described_model(path: Path) -> dict | None:
    """The `model` section of a checkpoint's run.json (the newest of a run's folder); None for other folders."""
    found = newest_checkpoint(path)
    return read_run_file(found)["model"] if found else None


def verify(checkpoint: Path) -> None:
    """Raises DamagedCheckpoint, on all ranks, unless every file is what was written; collective."""
    verify_files(checkpoint, read_run_file(checkpoint).get("sha256", {}))
