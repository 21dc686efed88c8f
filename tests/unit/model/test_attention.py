"""Attention on a CPU against torch's on each sample alone."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import megatron_moellava.platform  # noqa: F401 -- before megatron.core
from megatron_moellava.model.attention import SHORT, SdpaCoreAttention, packed_seq_params

from megatron.core.transformer.enums import AttnMaskType


@pytest.mark.parametrize("lengths", [[3, 2, 5], [SHORT + 60, 7, SHORT, SHORT + 1], [SHORT + 1]])
@pytest.mark.parametrize(("groups", "channels"), [(4, 8), (2, 8), (4, 6)])
def test_packed_attention_is_each_sample_by_itself(lengths, groups, channels):
    """`channels`: of the values, which multi-latent attention has fewer of."""
    torch.manual_seed(1)
    config = SimpleNamespace(context_parallel_size=1, kv_channels=8, attention_dropout=0.0)
    module = SdpaCoreAttention(config, 1, AttnMaskType.causal, "self")
    tokens = sum(lengths)
    boundaries = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = packed_seq_params(torch.tensor(boundaries), max(lengths))
    shapes = ((4, 8), (groups, 8), (groups, channels))
    inputs = [torch.randn(tokens, 1, *shape, requires_grad=True) for shape in shapes]
    output = module(*inputs, None, packed_seq_params=packed)

    def sample(start: int, end: int) -> torch.Tensor:
        query, key, value = (item[start:end].permute(1, 2, 0, 3) for item in inputs)
        key, value = (item.repeat_interleave(4 // groups, dim=1) for item in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(8)
        future = torch.full(scores.shape[-2:], float("-inf")).triu(1)
        return ((scores + future).softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)

    expected = torch.cat([sample(start, end) for start, end in pairwise(boundaries)])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    gradient = torch.randn_like(expected)
    for ours, other in zip(
        torch.autograd.grad(output, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-3)
