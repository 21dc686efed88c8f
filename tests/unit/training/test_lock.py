"""One job per folder."""

import json
import os
import subprocess
import sys

import pytest

from megatron_moellava.config import CheckpointError
from megatron_moellava.training import lock
from megatron_moellava.training.lock import NAME, lock_folder

HOLD = f"""
import fcntl, sys
file = open({NAME!r}, "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('{{"host": "node7", "process": 12, "slurm_job": "99"}}')
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_owner_is_written_down_and_the_lock_goes_with_the_file(world, tmp_path):
    file = lock_folder(tmp_path / "new")
    owner = json.loads((tmp_path / "new" / NAME).read_text())
    assert owner["process"] == os.getpid() and owner["host"] == os.uname().nodename
    file.close()
    lock_folder(tmp_path / "new").close()


def test_a_run_without_a_folder_locks_nothing(world):
    assert lock_folder(None) is None


def test_a_folder_in_use_is_refused_with_its_owner(world, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=r"process 12 on node7 \(SLURM job 99\) is writing to it; wait"):
            lock_folder(tmp_path)
    finally:
        holder.communicate("")
    lock_folder(tmp_path).close()  # the kernel has taken it away with the process


def test_a_file_where_a_folder_should_be_is_an_error(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint\.save=.*file cannot be used"):
        lock_folder(tmp_path / "file")
