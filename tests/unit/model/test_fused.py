"""What is one node of autograd's graph computes what torch and Megatron-Core spell out, and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron_moellava.model import fused

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


def compare(function, spelled, *inputs, **tolerance):
    """The result and the gradients of both, for one random gradient of the result."""
    found = []
    for compute in (function, spelled):
        copies = [item.detach().requires_grad_() for item in inputs]
        result = compute(*copies)
        found.append((result, *torch.autograd.grad(result, copies, drawn(*result.shape, dtype=result.dtype))))
    for own, other in zip(*found, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other, **tolerance)


def norm(x, weight):
    return fused.RootMeanSquare.apply(x, weight, 1e-5)


def spelled_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


@pytest.mark.parametrize("shape", [(7, 2, 12), (5, 12)])
def test_root_mean_square(shape):
    compare(norm, spelled_norm, drawn(*shape, dtype=torch.float32), 1 + drawn(12, dtype=torch.float32))


def test_root_mean_square_in_bf16_rounds_as_torch_does():
    x, weight = drawn(64, 32, dtype=torch.bfloat16), 1 + drawn(32, dtype=torch.bfloat16)
    assert torch.equal(norm(x, weight), spelled_norm(x, weight))
    compare(norm, spelled_norm, x, weight, rtol=2e-2, atol=2e-2)


def test_the_norms_weight_has_no_gradient_where_none_is_wanted():
    x = drawn(3, 4, dtype=torch.float32).requires_grad_()
    module = fused.RMSNorm(4, eps=1e-5).requires_grad_(False)
    module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is None


def angles_of(sequence: int, channels: int, batch: int = 1):
    half = drawn(sequence, batch, 1, channels // 2, dtype=torch.float32)
    return torch.cat([half, half], dim=-1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("turned", [8, 6])  # of 8 channels: all, or the first
def test_rotated_is_megatron_cores(turned, batch):
    heads = drawn(5, 3, 2, 16, dtype=torch.float32)[..., 4:12]  # as query and key lie in their product
    angles = angles_of(5, turned, batch)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, apply_rope_fusion=False)
    compare(
        lambda x: fused.rotated(x, angles),
        lambda x: rope_utils.apply_rotary_pos_emb(x, angles, config, cp_group=object()),
        heads,
    )


def test_layers_share_one_copy_of_the_angles_and_it_goes_with_them():
    angles, heads = angles_of(5, 8), drawn(5, 1, 2, 8, dtype=torch.float32)
    first, again = fused.turns(angles, heads), fused.turns(angles, heads)
    assert first[0] is again[0] and angles in fused._turns
    others = len(fused._turns) - 1
    del angles
    assert len(fused._turns) == others


def test_nothing_is_kept_of_a_forward_pass_that_is_made_again():
    angles, heads = angles_of(5, 8), drawn(5, 1, 2, 8, dtype=torch.float32)
    with torch.no_grad():
        alone = fused.rotated(heads, angles)
    assert angles not in fused._turns and torch.equal(alone, fused.rotated(heads, angles))


def test_of_batches_the_last_ones_turns_are_kept():
    angles = angles_of(5, 8)
    for batch in (1, 3, 2):
        heads = drawn(5, batch, 2, 8, dtype=torch.float32)
        assert torch.equal(fused.rotated(heads, angles), fused.rotated(heads, angles.clone()))
    assert [cosines.shape[1] for cosines, _ in fused._turns[angles].values()] == [2]


def test_other_angles_of_the_same_shape_turn_otherwise():
    heads = drawn(5, 1, 2, 8, dtype=torch.float32)
    one, two = angles_of(5, 8), 2 * angles_of(5, 8)
    assert not torch.equal(fused.rotated(heads, one), fused.rotated(heads, two))
