"""Is a checkpoint still what was written? Asked by everything that reads one, before it uses anything of it."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moellava.checkpoint.description import ANEW, RunDescription, read_description, write_description
from megatron_moellava.checkpoint.folders import RUN_FILE, TRACKER, passed_over
from megatron_moellava.checkpoint.integrity import (
    DamagedCheckpoint,
    Progress,
    damaged_files,
    file_digests,
    files_below,
    listed,
)


def tell(text: str) -> None:
    """To standard error, by the first rank alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def verify_checkpoint(
    checkpoint: Path,
    *,
    verify: bool = True,
    together: bool = False,
    goes_back: bool = True,
    say: Callable[[str], None] = tell,
) -> RunDescription:
    """The description of an iteration folder, when every file of it is what was written.

    `verify`: False leaves it at run.json's own seal, and says so. `together`: all ranks call it, each reads its share
    of the files and all raise the same; without it this process reads all. `goes_back`: say so where the tracker file is
    the reason why this checkpoint is meant and not a newer one. `say`: takes notes for the user.
    Raises DamagedCheckpoint that names every file that is missing or differs.
    """
    description = read_description(checkpoint)
    expected = description.sha256
    if goes_back and (newer := passed_over(checkpoint)):
        names = ", ".join(path.name for path in newer)
        say(f"{checkpoint} is used, as {checkpoint.parent / TRACKER} says, and not the newer {names}")
    if not verify:
        say(f"nothing of {checkpoint} was verified (--no-verify): a damaged file would not be noticed")
        return description
    if not expected or description.checksum is None:
        what = "its files have no digests" if not expected else f"{RUN_FILE} has no seal"
        say(
            f"{checkpoint} is of an older version: {what}, so damage cannot be noticed; "
            f"`moellava convert seal {checkpoint}` adds what is missing"
        )
    damaged = _damaged_together(checkpoint, expected) if together else _damaged(checkpoint, expected)
    if damaged:
        raise DamagedCheckpoint(f"{checkpoint} is damaged: {listed(damaged)}; {ANEW}")
    surplus = sorted(set(files_below(checkpoint)) - expected.keys() - {RUN_FILE}) if expected else []
    if surplus:
        say(f"{checkpoint} holds files that no run wrote there, they are not used: {', '.join(surplus[:12])}")
    return description


def digests_together(folder: Path, known: dict[str, str]) -> dict[str, str]:
    """{path below `folder`: SHA-256} of all files; collective.

    `known`: what this rank has computed before; those files are not read again. Of the rest rank r reads every n-th.
    """
    done = _shared(known)
    missing = [name for name in files_below(folder) if name not in done]
    return done | _shared(file_digests(folder, missing[dist.get_rank() :: dist.get_world_size()]))


def add_digests(checkpoint: Path) -> bool:
    """Give a checkpoint of an older version digests and a seal; they vouch for its present bytes only.

    Returns False when it has both already and they fit. Raises DamagedCheckpoint when they do not.
    """
    description = verify_checkpoint(checkpoint, say=lambda text: None)
    if description.sha256 and description.checksum:
        return False
    names = [name for name in files_below(checkpoint) if name != RUN_FILE]
    with progress_bar("hashing", checkpoint, names) as progress:
        digests = description.sha256 or file_digests(checkpoint, names, progress)
    write_description(checkpoint, replace(description, sha256=digests))
    return True


@contextlib.contextmanager
def progress_bar(what: str, folder: Path, names, silent: bool = False) -> Iterator[Progress]:
    """A bar over the bytes of files that several threads read; nothing where the output is not a terminal."""
    from tqdm import tqdm

    total = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    lock = threading.Lock()
    # disable=None: tqdm looks whether there is a terminal
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=silent or None) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        yield advance


def _damaged(checkpoint: Path, expected: dict[str, str], silent: bool = False) -> dict[str, str]:
    with progress_bar("verifying", checkpoint, expected, silent) as progress:
        return damaged_files(checkpoint, expected, progress)


def _damaged_together(checkpoint: Path, expected: dict[str, str]) -> dict[str, str]:
    rank = dist.get_rank()
    mine = sorted(expected)[rank :: dist.get_world_size()]
    return _shared(_damaged(checkpoint, {name: expected[name] for name in mine}, silent=rank > 0))


def _shared(mine: dict[str, str]) -> dict[str, str]:
    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}
