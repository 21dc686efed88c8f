"""One job per folder: two that write the same checkpoints would tear both runs apart.

A POSIX lock rather than a file that is there or not: the kernel takes it away with the process, however that ends, and
processes forked from this one (loader workers that outlive it) do not hold on to it. It works across nodes on NFS and on
Lustre mounted with `-o flock`; where a file system knows no locks, the run says so and goes on without.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from megatron_moellava.config import CheckpointError

NAME = "in_use.json"
PATIENCE_SECONDS = 10.0  # a process that was killed a moment ago may not be gone yet
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def lock_folder(folder: str | Path | None, say: Callable[[str], None] = print) -> TextIO | None:
    """Take `folder` for this run until the returned file is closed; collective. CheckpointError if another run has it."""
    result: list[str | None] = [None]
    file = None
    if folder is not None and dist.get_rank() == 0:
        try:
            file = _lock(Path(folder), say)
        except (OSError, CheckpointError) as error:
            result = [str(error)]
    dist.broadcast_object_list(result, src=0)
    if result[0] is not None:
        raise CheckpointError(f"checkpoint.save={folder} cannot be used: {result[0]}")
    return file


def _lock(folder: Path, say: Callable[[str], None]) -> TextIO | None:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / NAME).open("a+")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                say(f"{folder} is on a file system without locks: nothing keeps a second job from writing there too")
                break
            if time.monotonic() > deadline:
                raise CheckpointError(_owner(file)) from None
            time.sleep(0.2)
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID", "none")
    json.dump({"host": os.uname().nodename, "process": os.getpid(), "slurm_job": job}, file)
    file.flush()
    return file


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        who = f"process {owner['process']} on {owner['host']} (SLURM job {owner['slurm_job']})"
    except (ValueError, KeyError, TypeError):
        who = "another run"
    return f"{who} is writing to it; wait for that run, end it, or choose another checkpoint.save"
