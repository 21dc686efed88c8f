"""SHA-256 of every file of a checkpoint: written into run.json, compared on loading, shared between all ranks.

Megatron-Core's own manifest (`verify_integrity`) is made by rank 0 alone while the others wait.
"""

import hashlib
import json
from pathlib import Path

from megatron_moellava.config import CheckpointError


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing or is not what was written."""


def file_digests(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """{path below `folder`: SHA-256} of all files; collective. Rank r reads every n-th file, starting with its own number.

    `known`: what this rank has computed before; those files are not read again.
    """
    import torch.distributed as dist

    done = _shared(known or {})
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    missing = [name for name in names if name not in done]
    mine = missing[dist.get_rank() :: dist.get_world_size()]
    return done | _shared({name: file_digest(folder / name) for name in mine})


def verify_files(checkpoint: Path, expected: dict[str, str]) -> None:
    """Raises DamagedCheckpoint, on all ranks, that names every file which is missing or differs from what was written."""
    import torch.distributed as dist

    names = sorted(expected)[dist.get_rank() :: dist.get_world_size()]
    found = _shared(
        {name: file_digest(checkpoint / name) if (checkpoint / name).is_file() else "missing" for name in names}
    )
    damaged = [
        f"{name} ({'is missing' if found[name] == 'missing' else 'differs from what was written'})"
        for name in sorted(expected)
        if found[name] != expected[name]
    ]
    if damaged:
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {', '.join(damaged)}; copy it anew, or use another one")


def sealed(description: dict) -> dict:
    """The content of run.json with a checksum of itself."""
    return description | {"checksum": _checksum(description)}


def check_seal(path: Path, description: dict) -> None:
    """DamagedCheckpoint when run.json is not what was written. Conversions and older checkpoints have no seal."""
    if "checksum" in description and description["checksum"] != _checksum(description):
        raise DamagedCheckpoint(f"{path} differs from what was written; copy it anew, or use another checkpoint")


def _checksum(description: dict) -> str:
    content = {key: value for key, value in description.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shared(mine: dict[str, str]) -> dict[str, str]:
    import torch.distributed as dist

    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: digest for part in parts for name, digest in part.items()}
