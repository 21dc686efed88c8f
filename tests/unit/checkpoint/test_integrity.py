"""SHA-256 of files, while they are written and afterwards."""

import hashlib
import os
import subprocess
import sys
import tracemalloc

from megatron_moellava.checkpoint.integrity import (
    BLOCK,
    HashingFile,
    damaged_files,
    file_digest,
    file_digests,
    files_below,
    listed,
)


def test_digest_of_what_is_written_is_that_of_the_file(tmp_path):
    """The writer's one buffer is used again while the thread is still hashing."""
    buffer = bytearray(BLOCK)
    with HashingFile(tmp_path / "file") as file:
        for number in range(100):
            buffer[:] = bytes([number]) * BLOCK
            file.write(memoryview(buffer))
            file.write(b"frame")
        assert file.tell() == 100 * (BLOCK + 5)
    content = (tmp_path / "file").read_bytes()
    assert content[BLOCK - 1 : BLOCK + 6] == b"\0frame\1"
    assert file.digest == hashlib.sha256(content).hexdigest() == file_digest(tmp_path / "file")


def test_a_full_disk_is_no_short_file(tmp_path):
    """The system takes a part of the last block without a word."""
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from megatron_moellava.checkpoint.integrity import HashingFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "with HashingFile(Path(sys.argv[1])) as file:\n    file.write(bytes(1500))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "f"], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert (tmp_path / "f").stat().st_size == 1000


def test_every_file_that_differs_is_named(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("same", "longer", "emptied", "missing", "below/flipped"):
        (tmp_path / name).write_bytes(os.urandom(3 * BLOCK + 7))
    names = files_below(tmp_path)
    expected = file_digests(tmp_path, names)
    assert names == sorted(expected) and not damaged_files(tmp_path, expected)
    with (tmp_path / "longer").open("ab") as file:
        file.write(b"x")
    (tmp_path / "emptied").write_bytes(b"")
    (tmp_path / "missing").unlink()
    with (tmp_path / "below/flipped").open("r+b") as file:
        file.seek(2 * BLOCK)
        byte = file.read(1)[0]
        file.seek(2 * BLOCK)
        file.write(bytes([byte ^ 128]))
    assert damaged_files(tmp_path, expected) == {
        "longer": "differs from what was written",
        "emptied": "is empty",
        "missing": "is missing",
        "below/flipped": "differs from what was written",
    }


def test_a_file_that_cannot_be_read_is_a_problem_of_that_file(tmp_path):
    """/proc/self/mem opens, and fails when it is read from its beginning: an I/O error as of a dying disk."""
    (tmp_path / "sick").symlink_to("/proc/self/mem")
    assert damaged_files(tmp_path, {"sick": "0" * 64}) == {"sick": "cannot be read: Input/output error"}


def test_progress_adds_up_to_all_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(BLOCK + 1))
    (tmp_path / "b").write_bytes(b"")
    counts = []
    file_digests(tmp_path, ["a", "b"], counts.append)
    assert sum(counts) == BLOCK + 1


def test_long_lists_are_cut():
    assert listed({"b": "is missing", "a": "is empty"}) == "a (is empty), b (is missing)"
    assert listed({f"{n:02}": "is empty" for n in range(14)}).endswith("11 (is empty) and 2 more")


def test_memory_stays_flat(tmp_path):
    """A reader of 64 MB holds a block, not the file."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * BLOCK)
    tracemalloc.start()
    file_digest(tmp_path / "large")
    assert tracemalloc.get_traced_memory()[1] < 3 * BLOCK
    tracemalloc.stop()
