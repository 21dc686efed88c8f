"""Attention on a CPU against torch's on each sample alone."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import megatron_moellava.platform  # noqa: F401 -- before megatron.core
from megatron_moellava.model.attention import SHORT, SHORT_BF16, SdpaCoreAttention, packed_seq_params, sample_batches

from megatron.core.transformer.enums import AttnMaskType


@pytest.mark.parametrize("lengths", [[3, 2, 5], [SHORT + 60, 7, SHORT, SHORT + 1, 0, SHORT - 3], [SHORT + 1]])
@pytest.mark.parametrize(("groups", "channels"), [(4, 8), (2, 8), (4, 6)])
def test_packed_attention_is_each_sample_by_itself(lengths, groups, channels):
    """`channels`: of the values, which multi-latent attention has fewer of."""
    packed = compare_with_single_samples(lengths, groups, channels, torch.float32, {"atol": 1e-5, "rtol": 1e-4})
    assert list(packed.cuts) == [SHORT]


def test_longer_samples_are_spelt_out_in_bf16():
    lengths = [SHORT_BF16 + 9, 5, SHORT + 99]
    packed = compare_with_single_samples(lengths, 2, 8, torch.bfloat16, {"atol": 2e-2, "rtol": 2e-2})
    assert list(packed.cuts) == [SHORT_BF16]


def compare_with_single_samples(lengths, groups, channels, dtype, tolerance):
    """The row that was compared."""
    torch.manual_seed(1)
    config = SimpleNamespace(context_parallel_size=1, kv_channels=8, attention_dropout=0.0)
    module = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")
    tokens = sum(lengths)
    boundaries = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = packed_seq_params(torch.tensor(boundaries), max(lengths))
    shapes = ((4, 8), (groups, 8), (groups, channels))
    inputs = [torch.randn(tokens, 1, *shape, dtype=dtype, requires_grad=True) for shape in shapes]
    output = module(*inputs, None, packed_seq_params=packed)

    def sample(start: int, end: int) -> torch.Tensor:
        query, key, value = (item[start:end].float().permute(1, 2, 0, 3) for item in inputs)
        key, value = (item.repeat_interleave(4 // groups, dim=1) for item in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(8)
        future = torch.full(scores.shape[-2:], float("-inf")).triu(1)
        return ((scores + future).softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2).to(dtype)

    expected = torch.cat([sample(start, end) for start, end in pairwise(boundaries)])
    torch.testing.assert_close(output, expected, **tolerance)
    gradient = torch.randn_like(expected)
    for ours, other in zip(
        torch.autograd.grad(output, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, other, atol=10 * tolerance["atol"], rtol=10 * tolerance["rtol"])
    return packed


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([3, 2], [(2, 8)]),  # rounded up
        ([100, 30, 120, 5], [(4, 120)]),  # little would be spared
        ([200, 30, 190, 5], [(2, 200), (2, 32)]),
        ([40, 300, 300, 7], [(1, 300), (1, 300), (2, 40)]),  # long ones alone and as they are
        ([8, 0, 8], [(2, 8)]),
    ],
)
def test_samples_of_nearly_one_length_are_a_batch(lengths, shapes):
    batches = sample_batches(lengths, 256)
    assert batches.shapes == shapes
    assert len(batches.rows_P) == sum(samples * tokens for samples, tokens in shapes)
    assert torch.equal(batches.rows_P[batches.places_T], torch.arange(sum(lengths)))


def test_layers_share_the_cut_of_a_row():
    packed = packed_seq_params(torch.tensor([0, 3, 5]), 3)
    assert packed.batches(256) is packed.batches(256)
