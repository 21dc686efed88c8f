"""Norms of the local layer spec."""

from dataclasses import dataclass

import pytest
import torch

from megatron_moellava.model.norms import HeadsNorm, Norm


@dataclass
class Settings:
    normalization: str = "RMSNorm"
    params_dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False


def test_values_are_those_of_the_formulas():
    x_NH = torch.randn(3, 8)
    rms = Norm(Settings(), 8, eps=1e-6)(x_NH)
    assert torch.allclose(rms, x_NH / (x_NH.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt(), atol=1e-6)
    layer = Norm(Settings("LayerNorm"), 8, eps=1e-5)(x_NH)
    centred_NH = x_NH - x_NH.mean(-1, keepdim=True)
    assert torch.allclose(layer, centred_NH / (centred_NH.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_are_summed_over_tensor_parallel_ranks_under_sequence_parallelism(sequence_parallel):
    norm = Norm(Settings("LayerNorm", torch.bfloat16, sequence_parallel), 8)
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in norm.parameters())


def test_a_norm_over_all_heads_is_torchs_of_the_heads_together():
    """In bf16 too: transformers' OLMoE rounds the normalised value before it is multiplied by the weight."""
    heads, channels = 3, 4
    for dtype in (torch.float32, torch.bfloat16):
        norm = HeadsNorm(heads, Settings(params_dtype=dtype), channels, eps=1e-5)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(heads * channels))
        x_SBHD = torch.randn(5, 2, heads, channels, dtype=dtype)
        whole = x_SBHD.flatten(2).float()
        scaled = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + 1e-5)
        assert torch.equal(norm(x_SBHD).flatten(2), norm.weight * scaled.to(dtype))
