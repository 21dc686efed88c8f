"""Bytes and FLOPs counted on real and on fake tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_moellava.planning.counting import SavedTensors, flop_counter, storage_bytes


def test_a_storage_is_counted_once_whoever_holds_it():
    base = torch.zeros(10)
    assert storage_bytes([base, base[2:], base.view(2, 5)]) == 40
    assert storage_bytes([base, torch.zeros(3, dtype=torch.bfloat16)]) == 46
    with FakeTensorMode():
        first, second = torch.zeros(10), torch.zeros(10)
        assert storage_bytes([first, first[1:], second]) == 80


def test_what_autograd_keeps_is_noted_except_the_parameters():
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    saved = SavedTensors(excluded=[weight])
    with saved:
        (x @ weight).exp().sum().backward()
    assert saved.bytes == x.nbytes + x.nbytes, "the input of the product and the exponential itself"


def test_grouped_products_and_attention_are_counted():
    rows, experts, inner, outer = 6, 2, 4, 8
    offsets = torch.tensor([2, rows], dtype=torch.int32)
    with flop_counter() as counter:
        F.grouped_mm(torch.randn(rows, inner), torch.randn(experts, inner, outer), offs=offsets)
    assert counter.get_total_flops() == 2 * rows * inner * outer
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with flop_counter() as counter:
        output = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    forward = 4 * 2 * 16 * 16 * 8
    assert counter.get_total_flops() == forward
    with flop_counter() as counter:
        output.sum().backward()
    assert counter.get_total_flops() == pytest.approx(2.5 * forward)
