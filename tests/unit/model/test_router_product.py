"""The router's product: fp32 from bf16 states, as megatron-core's on a CPU, and never two types in one product."""

import pytest
import torch
import torch.nn.functional as F

from megatron_moellava.config import MoEConfig
from megatron_moellava.model import layers
from megatron_moellava.model.attention import SdpaCoreAttention, causal_mask
from megatron_moellava.model.layers import needs_own_attention
from megatron_moellava.model.router import RouterProduct

from megatron.core.transformer.moe.moe_utils import router_gating_linear


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_and_gradients_are_megatrons(states, dtype):
    torch.manual_seed(1)
    input_SBH, weight_EH, grad = torch.randn(5, 2, 16), torch.randn(4, 16), torch.randn(5, 2, 4)
    results = []
    for product in (
        lambda x, w: RouterProduct.apply(x, w, dtype),
        lambda x, w: router_gating_linear(x, w, None, dtype),
    ):
        x = input_SBH.to(states).requires_grad_()
        w = weight_EH.clone().requires_grad_()
        logits = product(x, w)
        logits.backward(grad.to(dtype))
        results.append((logits.detach(), x.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_no_product_mixes_types(monkeypatch):
    """cuBLASLt has no product of fp32 and bf16; Transformer Engine would pass both on."""
    seen = []
    monkeypatch.setattr(F, "linear", lambda x, w: (seen.append((x.dtype, w.dtype)), x @ w.t())[1])
    RouterProduct.apply(torch.randn(3, 1, 8, dtype=torch.bfloat16), torch.randn(4, 8), torch.float32)
    assert seen == [(torch.float32, torch.float32)]


class _Config:
    context_parallel_size = 1


def test_rows_whose_padding_counts_keep_their_mask_with_transformer_engine(monkeypatch):
    monkeypatch.setattr(layers.platform, "HAS_TRANSFORMER_ENGINE", True)
    original = needs_own_attention(_Config(), MoEConfig(router="original", moe_expert_capacity_factor=1.5))
    assert original and layers.OwnAttentionModules.core_attention(None) is SdpaCoreAttention
    assert isinstance(layers.modules(original), layers.OwnAttentionModules)
    assert not needs_own_attention(_Config(), MoEConfig()) and not needs_own_attention(_Config(), None)
    assert type(layers.modules(False)) is layers.TESpecProvider


def test_the_last_query_sees_every_key():
    mask = causal_mask(2, 4, torch.device("cpu"))
    assert mask.tolist() == [[True, True, True, False], [True, True, True, True]]
