"""Weights laid out for few rows give the products of F.linear."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_moellava import platform
from megatron_moellava.inference.packed_linear import PackedLinear, can_pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_linear(dtype):
    linear = PackedLinear(packs=can_pack(dtype))
    weight_OI, bias_O, x = (
        torch.randn(24, 16, dtype=dtype),
        torch.randn(24, dtype=dtype),
        torch.randn(3, 16, dtype=dtype),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    for bias in (None, bias_O):
        assert torch.allclose(linear(x, weight_OI, bias), F.linear(x, weight_OI, bias), atol=tolerance)


def test_a_weight_is_packed_once_and_kept():
    linear = PackedLinear(packs=can_pack(torch.float32))
    if not linear.packs:
        pytest.skip("this CPU packs nothing")
    weight_OI = torch.randn(8, 8)
    for _ in range(2):
        linear(torch.randn(1, 8), weight_OI)
    ((kept, _),) = linear._packed.values()
    assert kept is weight_OI, "another tensor could get its identity"


def test_without_packing_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(platform, "HAS_CUDA", True)
    assert not can_pack(torch.float32)
    linear = PackedLinear(packs=False)
    linear(torch.randn(1, 8), torch.randn(8, 8))
    assert not linear._packed


def test_kernels_for_every_number_of_rows_do_not_pile_up():
    """In a process of its own, whose caches are new. Half a megabyte each: 100 more than are kept were 50 MB."""
    code = """
import ctypes
import torch
from megatron_moellava.inference.packed_linear import KERNELS, PackedLinear, can_pack

class Counts(ctypes.Structure):  # mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks used".split()]
    _fields_ += [("free", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

allocated = ctypes.CDLL(None).mallinfo2
allocated.restype = Counts
linear, weight_OI = PackedLinear(can_pack(torch.float32)), torch.ones(384, 128)
kept = int(KERNELS["LRU_CACHE_CAPACITY"])
for rows in range(1, kept + 100):
    if rows == kept:
        before = allocated().used
    linear(torch.ones(rows, 128), weight_OI)
print(linear.packs, allocated().used - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packs, grown = done.stdout.split()
    if packs != "True":
        pytest.skip("this CPU packs nothing")
    assert int(grown) < 25e6
