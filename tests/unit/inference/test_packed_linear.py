"""Weights laid out for few rows give the products of F.linear."""

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
