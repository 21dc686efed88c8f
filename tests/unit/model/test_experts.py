"""The experts' activation on a CPU against torch's autograd on the formula."""

import pytest
import torch
import torch.nn.functional as F

import megatron_moellava.platform  # noqa: F401 -- before megatron.core
from megatron_moellava.model.experts import (
    BLOCK,
    ProductOfSeparate,
    WeightedActivation,
    WeightedBias,
    for_each_row,
    offsets,
)
from megatron_moellava.planning.counting import SavedTensors


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


@pytest.mark.parametrize("trained", [(True, True, True, True), (False, True, False, True), (False,) * 4])
def test_separate_experts_have_the_products_of_stacked_ones_bit_by_bit(trained):
    """One expert has no rows; frozen experts get no gradient."""
    torch.manual_seed(1)
    input_NI, ends_E = torch.randn(48, 32).bfloat16().requires_grad_(), offsets(torch.tensor([5, 0, 25, 18]))
    weights = [torch.randn(64, 32).bfloat16().requires_grad_(is_trained) for is_trained in trained]
    grad_NO = torch.randn(48, 64).bfloat16()
    wanted = [input_NI, *(weight for weight in weights if weight.requires_grad)]
    stacked = F.grouped_mm(input_NI, torch.stack(weights).transpose(1, 2), offs=ends_E)
    separate = ProductOfSeparate.apply(input_NI, ends_E, *weights)
    assert torch.equal(separate, stacked)
    pairs = (torch.autograd.grad(output, wanted, grad_NO) for output in (separate, stacked))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pairs, strict=True))


def test_separate_experts_are_not_kept_twice():
    input_NI, weights = torch.randn(8, 32).requires_grad_(), [torch.randn(64, 32).requires_grad_() for _ in range(4)]
    kept = SavedTensors(weights)
    with kept:
        ProductOfSeparate.apply(input_NI, offsets(torch.tensor([2, 2, 2, 2])), *weights)
    assert kept.bytes <= input_NI.nbytes + 4 * 4


def test_what_belongs_to_each_row_is_fp32():
    """In which the gradients of many rows add up; a GPU would add them in bf16 otherwise, where a sum of ones ends at 256."""
    biases = torch.arange(6.0, dtype=torch.bfloat16).view(2, 3)
    rows = for_each_row(biases, torch.tensor([1, 2]), 3)
    assert rows.dtype == torch.float32 and rows.tolist() == [[0, 1, 2], [3, 4, 5], [3, 4, 5]]


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
