"""SHA-256 of every file of a checkpoint: written into run.json, compared on loading, shared between all ranks.

Megatron-Core's own manifest (`verify_integrity`) is made by rank 0 alone while the others wait.
"""

import hashlib
from pathlib import Path

import torch.distributed as dist

from megatron_moellava.config import CheckpointError


def file_digests(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """{path below `folder`: SHA-256} of all files; collective. Rank r reads every n-th file, starting with its own number.

    `known`: what this rank has computed before; those files are not read again.
    """
    done = _shared(known or {})
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    missing = [name for name in names if name not in done]
    mine = missing[dist.get_rank() :: dist.get_world_size()]
    return done | _shared({name: file_digest(folder / name) for name in mine})


def verify_files(checkpoint: Path, expected: dict[str, str]) -> None:
    """Raises CheckpointError, on all ranks, that names every file which is missing or differs from what was written."""
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
        raise CheckpointError(
            f"{checkpoint} is damaged: {', '.join(damaged)}; remove this folder to go on from an older checkpoint, or copy "
            "it anew"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shared(mine: dict[str, str]) -> dict[str, str]:
    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: digest for part in parts for name, digest in part.items()}
