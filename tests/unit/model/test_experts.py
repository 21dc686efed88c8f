"""The experts' activation on a CPU against torch's autograd on the formula."""

import pytest
import torch
import torch.nn.functional as F

import megatron_moellava.platform  # noqa: F401 -- before megatron.core
from megatron_moellava.model.experts import BLOCK, WeightedActivation, WeightedBias
from megatron_moellava.planning.counting import SavedTensors


@pytest.mark.parametrize("rows", [0, 1, BLOCK // 24, 2 * (BLOCK // 24) + 37])
@pytest.mark.parametrize("activation, is_gated", [(F.silu, True), (F.silu, False), (F.gelu, True), (F.gelu, False)])
def test_weighted_activation(rows, activation, is_gated):
    torch.manual_seed(1)
    inner = torch.randn(rows, 24, requires_grad=True)
    weights = torch.rand(rows, 1, requires_grad=True)
    before = inner.detach().clone()
    output = WeightedActivation.apply(inner, weights, activation, is_gated)
    gate, up = inner.chunk(2, dim=1) if is_gated else (inner, torch.ones(()))
    expected = activation(gate) * up * weights
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    kept = gradient.clone()
    for ours, other in zip(
        torch.autograd.grad(output, (inner, weights), gradient),
        torch.autograd.grad(expected, (inner, weights), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, other)
    assert torch.equal(inner, before), "an operand was written over"
    assert torch.equal(gradient, kept), "the gradient may be another's, too"


def test_weighted_activation_of_bf16_is_rounded_once():
    torch.manual_seed(1)
    inner, weights = torch.randn(300, 16).bfloat16(), torch.rand(300, 1)
    gate, up = inner.float().chunk(2, dim=1)
    output = WeightedActivation.apply(inner, weights, F.silu, True)
    assert torch.equal(output, (F.silu(gate) * up * weights).bfloat16())


def test_weighted_biases_have_autograds_gradients_and_keep_no_rows():
    torch.manual_seed(1)
    output, weights = torch.randn(40, 8, requires_grad=True), torch.rand(40, 1, requires_grad=True)
    biases, counts = torch.randn(3, 8, requires_grad=True), torch.tensor([25, 0, 15])
    inputs, gradient = (output, biases, weights), torch.randn(40, 8)
    expected = output + biases.repeat_interleave(counts, dim=0) * weights
    kept = SavedTensors([biases])
    with kept:
        found = WeightedBias.apply(output, biases, weights, counts)
    assert kept.bytes <= weights.nbytes + counts.nbytes
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad(value, inputs, gradient) for value in (found, expected))
    for ours, other in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, other)
