"""SHA-256 of files: computed while they are written, or by several threads from what lies on the disk.

Megatron-Core's own manifest (`verify_integrity`) is made by rank 0 alone while the others wait. hashlib releases
Python's lock, so threads hash at the same time.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_moellava.config import CheckpointError

BLOCK = 1 << 20  # bytes hashed at a time; stays in a processor's cache between the read and the hash
MOST_THREADS = 8
QUEUED_BLOCKS = 32  # between a writer and the thread that hashes
Progress = Callable[[int], object]  # called with the number of bytes just done, by several threads


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing or is not what was written."""


def file_digest(path: Path, progress: Progress = lambda count: None) -> str:
    """SHA-256 of one file, as hexadecimal digits."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()


def file_digests(folder: Path, names: Iterable[str], progress: Progress = lambda count: None) -> dict[str, str]:
    """{name: SHA-256} of files below `folder`, several at a time. OSError for one that cannot be read."""
    names = list(names)
    with ThreadPoolExecutor(_threads()) as pool:
        return dict(zip(names, pool.map(lambda name: file_digest(folder / name, progress), names), strict=True))


def damaged_files(folder: Path, expected: dict[str, str], progress: Progress = lambda count: None) -> dict[str, str]:
    """{name: what is wrong with it} of the files below `folder` whose SHA-256 is not the expected one."""

    def problem(name: str) -> str | None:
        path = folder / name
        if not path.is_file():
            return "is missing"
        try:
            if file_digest(path, progress) == expected[name]:
                return None
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return "differs from what was written" if path.stat().st_size else "is empty"

    with ThreadPoolExecutor(_threads()) as pool:
        return {name: what for name, what in zip(expected, pool.map(problem, expected), strict=True) if what}


def files_below(folder: Path) -> list[str]:
    """Paths of all files below `folder`, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def listed(problems: dict[str, str], limit: int = 12) -> str:
    """`{"a": "is missing"}` -> "a (is missing)"; long lists are cut."""
    names = sorted(problems)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"{name} ({problems[name]})" for name in names[:limit]) + more


def _threads() -> int:
    """The cores that this process may call its own beside the other processes of its machine."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(cores, 1), MOST_THREADS)


class HashingFile:
    """A new file whose SHA-256 is computed from the bytes that pass, by a thread of its own.

    So the digest is that of what was meant, whatever the disk makes of it.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._blocks: queue.Queue[bytes | None] = queue.Queue(QUEUED_BLOCKS)
        self._thread = threading.Thread(target=self._hash, name="digest", daemon=True)
        self._thread.start()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def tell(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Append all of `block`, which may change afterwards."""
        self._blocks.put(bytes(block))
        left = memoryview(block).cast("B")
        while left:  # the system may take less than it is given: at 2 GiB, or when the disk is nearly full
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Finish; `digest` is known from now on."""
        if self._file.closed:
            return
        self._blocks.put(None)
        self._thread.join()
        self._file.close()

    @property
    def digest(self) -> str:
        """SHA-256 of a closed file."""
        assert self._file.closed, "more bytes may come"
        return self._digest.hexdigest()

    def _hash(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._digest.update(block)
