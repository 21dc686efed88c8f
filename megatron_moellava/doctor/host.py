"""The host: cores, memory, shared memory, limits, and the folder that a run would write to."""

import fcntl
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.doctor.findings import Finding
from megatron_moellava.training.lock import NO_LOCKS

MACHINE, FOLDER = "machine", "folder"
SHARED = Path("/dev/shm")  # through it loader workers hand over batches, and NCCL its buffers
ENOUGH_SHARED = 1 << 30  # a row of 2048 tokens and 4 pictures is 8 MB, and each worker keeps two batches ahead
ENOUGH_FILES = 4096
ENOUGH_DISK = 20 << 30  # a stage of a 2.7B model writes 16 bytes per trained parameter
SLOW_WRITES = 50e6  # bytes a second
_PROBE = 16 << 20
_GIB = 1 << 30


def machine() -> Iterator[Finding]:
    """System, processor, memory, shared memory, limits, name."""
    yield Finding(part=MACHINE, name="system", found=f"{platform.system()} {platform.release()}, {platform.machine()}")
    cores, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    few = cores < all_cores
    yield Finding(
        part=MACHINE,
        name="cores",
        found=f"{cores} of {all_cores}" if few else f"{cores}",
        meaning="processes of a node share them; OMP_NUM_THREADS overrides"
        + (" (taskset, a cpuset or the batch system keeps this process from the others)" if few else ""),
    )
    yield memory(*_memory())
    yield shared_memory(SHARED)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Finding(
        part=MACHINE,
        name="open files",
        found="unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}",
        meaning="" if soft >= ENOUGH_FILES or soft < 0 else f"many workers need more: ulimit -n {ENOUGH_FILES * 16}",
        level="ok" if soft >= ENOUGH_FILES or soft < 0 else "note",
    )
    yield name_of_host(socket.gethostname())


def memory(total: int, available: int, limit: int | None) -> Finding:
    """Bytes of the host, and of the control group where it is held to fewer."""
    held = limit is not None and limit < total
    found = f"{available / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    meaning = f"the control group ends processes beyond {limit / _GIB:.1f} GiB" if held and limit else ""
    return Finding(part=MACHINE, name="memory", found=found, meaning=meaning, level="note" if held else "ok")


def shared_memory(path: Path) -> Finding:
    """Workers that read ahead, and NCCL within a node, die where it is full."""
    name = str(path)
    if not path.is_dir():
        return Finding(part=MACHINE, name=name, found="missing", meaning="use data.num_workers=0", level="problem")
    free = shutil.disk_usage(path).free
    few = free < ENOUGH_SHARED
    meaning = "loader workers hand over batches through it" + (
        "; a container gets more with --shm-size or --ipc=host, or use data.num_workers=0" if few else ""
    )
    found = f"{free / _GIB:.2f} GiB free"
    return Finding(part=MACHINE, name=name, found=found, meaning=meaning, level="note" if few else "ok")


def name_of_host(name: str) -> Finding:
    """Processes of several nodes look for each other by it, and gloo does on one node too."""
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        meaning = (
            f"it has no address ({error.strerror or error}); gloo needs GLOO_SOCKET_IFNAME=lo, or a line in /etc/hosts"
        )
        return Finding(part=MACHINE, name="host name", found=name, meaning=meaning, level="note")
    return Finding(part=MACHINE, name="host name", found=f"{name}, {address}")


def _memory() -> tuple[int, int, int | None]:
    import psutil

    found = psutil.virtual_memory()
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    texts = [path.read_text().strip() for path in limits if path.is_file()]
    limit = next((int(text) for text in texts if text.isdigit()), None)
    return found.total, found.available, limit


def folder(path: Path) -> Iterator[Finding]:
    """Space, locks and speed where a run would write, or of the nearest folder above that exists."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    usage = shutil.disk_usage(there)
    few = usage.free < ENOUGH_DISK
    yield Finding(
        part=FOLDER,
        name="space",
        found=f"{usage.free / _GIB:,.1f} GiB free of {usage.total / _GIB:,.1f} at {there}",
        meaning="a checkpoint takes 14 bytes per trained parameter in bf16 (16 in fp32), and checkpoint.keep of them stay"
        if few
        else "",
        level="note" if few else "ok",
    )
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".moellava-doctor-") as file:
            yield locks(file.fileno())
            yield write_speed(file.fileno())
    except OSError as error:
        yield Finding(
            part=FOLDER,
            name="writing",
            found=f"not possible at {there} ({error.strerror})",
            meaning="choose another checkpoint.save, or mend permissions, quota or mount",
            level="problem",
        )


def locks(descriptor: int) -> Finding:
    """Whether one job can keep another one from its folder."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        meaning = (
            "this file system knows none (Lustre: mount with -o flock): nothing keeps a second job from a run's folder"
        )
        return Finding(part=FOLDER, name="locks", found="missing", meaning=meaning, level="note")
    return Finding(part=FOLDER, name="locks", found="work", meaning="one job per folder is enforced")


def write_speed(descriptor: int) -> Finding:
    """Of one file, down to the disk."""
    started = time.perf_counter()
    os.write(descriptor, os.urandom(_PROBE))
    os.fsync(descriptor)
    speed = _PROBE / (time.perf_counter() - started)
    slow = speed < SLOW_WRITES
    meaning = (
        "a run waits for its checkpoints; checkpoint.async_save=true writes them beside the training" if slow else ""
    )
    found = f"{speed / 1e6:,.0f} MB/s"
    return Finding(part=FOLDER, name="writing", found=found, meaning=meaning, level="note" if slow else "ok")
