"""Products of one weight per expert beside torch's grouped_mm of the stacked ones."""

import pytest
import torch
import torch.nn.functional as F

import megatron_moellava.platform  # noqa: F401 -- before megatron.core
from megatron_moellava.model.grouped_products import (
    ProductByExpert,
    StackedProduct,
    counts_of,
    expert_blocks,
    for_each_row,
    grouped_product,
    offsets,
    product_of_separate,
)
from megatron_moellava.planning.counting import SavedTensors, flop_counter

COUNTS = [5, 0, 25, 18]
PRODUCTS = {
    "by expert": lambda input_NI, weights: ProductByExpert.apply(input_NI, COUNTS, *weights),
    "stacked": lambda input_NI, weights: StackedProduct.apply(input_NI, offsets(COUNTS), *weights),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("trained", [(True, True, True, True), (False, True, False, True), (False,) * 4])
def test_separate_experts_have_the_products_of_stacked_ones_bit_by_bit(product, trained):
    """One expert has no rows; frozen experts get no gradient."""
    torch.manual_seed(1)
    input_NI = torch.randn(48, 32).bfloat16().requires_grad_()
    weights = [torch.randn(64, 32).bfloat16().requires_grad_(is_trained) for is_trained in trained]
    grad_NO = torch.randn(48, 64).bfloat16()
    wanted = [input_NI, *(weight for weight in weights if weight.requires_grad)]
    stacked = F.grouped_mm(input_NI, torch.stack(weights).transpose(1, 2), offs=offsets(COUNTS))
    separate = PRODUCTS[product](input_NI, weights)
    assert torch.equal(separate, stacked)
    pairs = (torch.autograd.grad(output, wanted, grad_NO) for output in (separate, stacked))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pairs, strict=True))


@pytest.mark.parametrize("counts", [[3, 0, 14, 1], [40, 1, 0, 2], [0, 0, 0, 9], [17, 16, 15, 33], [0, 0, 0, 0]])
@pytest.mark.parametrize("sizes", [(32, 64), (64, 32)])
def test_neighbours_rows_change_nothing_whoever_has_few(counts, sizes):
    torch.manual_seed(2)
    inner, outer = sizes
    input_NI = torch.randn(sum(counts), inner).bfloat16().requires_grad_()
    weights = [torch.randn(outer, inner).bfloat16().requires_grad_() for _ in counts]
    grad_NO = torch.randn(sum(counts), outer).bfloat16()
    output = ProductByExpert.apply(input_NI, counts, *weights)
    alone = torch.cat([rows @ weight.t() for rows, weight in zip(input_NI.split(counts), weights, strict=True)])
    pairs = (torch.autograd.grad(result, [input_NI, *weights], grad_NO) for result in (output, alone))
    for ours, theirs in zip((output, *next(pairs)), (alone, *next(pairs)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_numbers_of_rows_in_16_bits_come_again():
    """Else oneDNN would compile a product for each of them."""
    counts = [5, 0, 25, 18, 100, 1]
    blocks = expert_blocks(counts, torch.bfloat16)
    assert [block.own.stop - block.own.start for block in blocks] == counts
    assert [block.wide.stop - block.wide.start for block in blocks] == [16, 0, 32, 32, 112, 16]
    for block in blocks:
        assert 0 <= block.wide.start <= block.own.start and block.own.stop <= block.wide.stop <= sum(counts)
    assert all(block.own == block.wide for block in expert_blocks(counts, torch.float32)), "fp32 is not compiled"
    assert all(block.own == block.wide for block in expert_blocks([5, 4], torch.bfloat16)), "too few rows in all"


@pytest.mark.parametrize("product", PRODUCTS)
def test_experts_are_not_kept_twice_and_frozen_ones_keep_no_input(product):
    input_NI = torch.randn(48, 32).requires_grad_()
    for is_trained, kept_of_input in ((True, input_NI.nbytes), (False, 0)):
        weights = [torch.randn(64, 32).requires_grad_(is_trained) for _ in COUNTS]
        kept = SavedTensors(weights)
        with kept:
            output = PRODUCTS[product](input_NI, weights)
        assert kept.bytes <= kept_of_input + 4 * len(COUNTS)
        assert output.requires_grad


def test_a_cpu_multiplies_where_the_weights_are():
    """No operation but the products: no copy of weights, rows or results. Their FLOPs are counted as grouped_mm's are."""
    input_NI, weights = torch.randn(48, 32), [torch.randn(64, 32) for _ in COUNTS]
    counters = []
    for way in (
        lambda: product_of_separate(input_NI, weights, counts_of(torch.tensor(COUNTS))),
        lambda: grouped_product(input_NI, torch.stack(weights), COUNTS),
    ):
        with flop_counter() as counter, torch.profiler.profile() as profile:
            way()
        counters.append((counter.get_total_flops(), {event.key for event in profile.key_averages()}))
    (flops, names), (stacked_flops, stacked_names) = counters
    assert flops == stacked_flops == 2 * 48 * 32 * 64
    assert not names & {"aten::cat", "aten::copy_", "aten::clone"} and "aten::cat" in stacked_names


def test_what_belongs_to_each_row_is_fp32():
    """In which the gradients of many rows add up; a GPU would add them in bf16 otherwise, where a sum of ones ends at 256."""
    biases = torch.arange(6.0, dtype=torch.bfloat16).view(2, 3)
    rows = for_each_row(biases, torch.tensor([1, 2]), 3)
    assert rows.dtype == torch.float32 and rows.tolist() == [[0, 1, 2], [3, 4, 5], [3, 4, 5]]
