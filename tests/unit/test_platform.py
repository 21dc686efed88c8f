"""What the platform changes for the whole process."""

import ctypes
import subprocess
import sys

import pytest

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
