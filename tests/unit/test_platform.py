"""What the platform changes for the whole process, and what it relies on in other packages."""

import ctypes
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_moellava import platform
from tests.helpers.paths import REPO
from tests.helpers.rules import TABLE, table_rows

LARGE = 64 * 2**20  # bytes; glibc by itself would give such a block back at once
REPEATS = 20
SCRIPT = f"""
import resource
import torch
import megatron_moellava.platform
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({REPEATS}):
        torch.zeros({LARGE}, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    block = LARGE / 2**21  # page faults of one block with pages of 2 MB, the least that a kernel can do with
    assert first > block  # a few blocks are touched until one fits again
    assert second < block


def exists(name: str) -> bool:
    """Whether the dotted `name` is a module, an attribute, or an attribute that the module's source gives to objects."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:-1]:
            found = getattr(found, part, None)
        file = Path(getattr(module, "__file__", ""))
        source = file.read_text() if file.suffix == ".py" and file.is_file() else ""
        return end == len(parts) or hasattr(found, parts[-1]) or bool(re.search(rf"\b{parts[-1]}\b", source))
    return False


def test_private_names_in_the_table_exist_in_what_is_installed():
    import megatron_moellava.platform  # noqa: F401  before Megatron-Core

    names = [name for name, *_ in table_rows((REPO / TABLE).read_text())]
    missing = [name for name in names if not exists(name)]
    assert len(names) > 20 and not missing, missing
    assert not exists("megatron.core.parallel_state._gone") and not exists("torch.ops.aten._gone")


@pytest.mark.skipif(platform.HAS_CUDA, reason="threads matter on a CPU")
@pytest.mark.parametrize(("variables", "threads"), [({}, [4]), ({"LOCAL_WORLD_SIZE": "2"}, [2])])
def test_processes_share_the_cores(monkeypatch, variables, threads):
    assert _threads(monkeypatch, variables) == threads


@pytest.mark.skipif(platform.HAS_CUDA, reason="threads matter on a CPU")
@pytest.mark.parametrize("variables", [{}, {"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "2"}])
def test_number_of_threads_that_the_user_sets_stays(monkeypatch, variables):
    assert _threads(monkeypatch, variables | {"OMP_NUM_THREADS": "3"}) == []


def _threads(monkeypatch, variables: dict[str, str]) -> list[int]:
    """What claim_device sets on four cores."""
    found: list[int] = []
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    platform.claim_device(0)
    return found


def test_memory_is_recorded_by_functions_that_are_there(tmp_path):
    """Nothing happens on a CPU; on a GPU these are called with these arguments."""
    record, dump = torch.cuda.memory._record_memory_history, torch.cuda.memory._dump_snapshot
    for arguments in ({"max_entries": 100_000}, {"enabled": None}):
        assert inspect.signature(record).bind(**arguments)
    assert inspect.signature(dump).bind("file")
    platform.record_memory()
    platform.save_memory(tmp_path / "memory.pickle")
    assert not list(tmp_path.iterdir())


def test_switches_for_a_run_that_misbehaves(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        platform.debug(deterministic=True, detect_anomaly=True)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_anomaly_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
    platform.debug(deterministic=False, detect_anomaly=False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.is_anomaly_enabled()
