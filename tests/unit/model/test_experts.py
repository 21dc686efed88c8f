"""The experts' activation on a CPU against torch's autograd on the formula."""

import pytest
import torch
import torch.nn.functional as F

import megatron_moellava.platform  # noqa: F401 -- before megatron.core
from megatron_moellava.model.experts import BLOCK, WeightedActivation


@pytest.mark.parametrize("rows", [0, 1, BLOCK, 2 * BLOCK + 37])
@pytest.mark.parametrize("activation, is_gated", [(F.silu, True), (F.silu, False), (F.gelu, True), (F.gelu, False)])
def test_weighted_activation(rows, activation, is_gated):
    torch.manual_seed(1)
    inner = torch.randn(rows, 24, requires_grad=True)
    weights = torch.rand(rows, 1, requires_grad=True)
    output = WeightedActivation.apply(inner, weights, activation, is_gated)
    gate, up = inner.chunk(2, dim=1) if is_gated else (inner, torch.ones(()))
    expected = activation(gate) * up * weights
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    for ours, other in zip(
        torch.autograd.grad(output, (inner, weights), gradient),
        torch.autograd.grad(expected, (inner, weights), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, other)


def test_weighted_activation_of_bf16_is_rounded_once():
    torch.manual_seed(1)
    inner, weights = torch.randn(300, 16).bfloat16(), torch.rand(300, 1)
    gate, up = inner.float().chunk(2, dim=1)
    output = WeightedActivation.apply(inner, weights, F.silu, True)
    assert torch.equal(output, (F.silu(gate) * up * weights).bfloat16())
