"""MoE layers beside Megatron-Core's own."""

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.moe_layer import HereDispatcher, MoELayer, ResidualMoELayer
from megatron_moellava.planning.counting import SavedTensors
from tests.helpers.inference_models import tiny_run

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


@torch.no_grad()
def test_the_coefficient_mixes_experts_and_dense_ffn(world):
    (model,) = build_model(tiny_run(MoEConfig(use_residual=True)))
    layer = next(module for module in model.eval().modules() if isinstance(module, ResidualMoELayer))
    hidden_SBH = torch.randn(5, 2, layer.config.hidden_size)
    experts_SBH, _ = MoELayer.forward(layer, hidden_SBH)
    dense_SBH, bias = layer.residual_mlp(hidden_SBH)
    assert bias is None
    layer.coefficient.weight.zero_()
    for mix, expected in (((50.0, 0.0), experts_SBH), ((0.0, 50.0), dense_SBH)):
        layer.coefficient.bias.copy_(torch.tensor(mix))
        assert torch.allclose(layer(hidden_SBH)[0], expected, atol=1e-6)
    layer.coefficient.bias.zero_()
    assert torch.allclose(layer(hidden_SBH)[0], (experts_SBH + dense_SBH) / 2, atol=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"moe_expert_capacity_factor": 0.7},
        {"moe_router_topk": 1, "num_moe_experts": 1},
    ],
    ids=["dropless", "capacity", "one expert"],
)
def test_tokens_of_experts_that_are_all_here_need_no_second_order(world, more):
    """Outputs and gradients are Megatron-Core's dispatcher's, bit by bit."""
    (model,) = build_model(tiny_run(MoEConfig(**more)))
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    assert type(layer.token_dispatcher) is HereDispatcher
    torch.manual_seed(1)
    hidden_SBH, grad_SBH = torch.randn(2, 12, 2, layer.config.hidden_size).unbind()
    results = []
    for dispatcher in (HereDispatcher, MoEAlltoAllTokenDispatcher):
        layer.token_dispatcher.__class__ = dispatcher
        trained = [hidden_SBH.clone().requires_grad_(), *layer.parameters()]
        output_SBH, _ = layer(trained[0])
        results.append((output_SBH, *torch.autograd.grad(output_SBH, trained, grad_SBH)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("backbone", ["llama-tiny", "phi-2-tiny"])
def test_a_recomputed_activation_changes_no_bit_and_is_not_kept(world, backbone):
    """Gated experts, and biased ones."""
    (model,) = build_model(tiny_run(MoEConfig(), backbone=backbone))
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    torch.manual_seed(1)
    hidden_SBH, grad_SBH = torch.randn(2, 12, 2, layer.config.hidden_size).unbind()
    results, kept = [], []
    for recomputes in (False, True):
        layer.experts.activation_recompute = recomputes
        trained, saved = [hidden_SBH.clone().requires_grad_(), *layer.parameters()], SavedTensors(layer.parameters())
        with saved:
            output_SBH, _ = layer(trained[0])
        kept.append(saved.bytes)
        results.append((output_SBH, *torch.autograd.grad(output_SBH, trained, grad_SBH)))
    assert all(torch.equal(again, plain) for plain, again in zip(*results, strict=True))
    rows = 12 * 2 * layer.config.moe_router_topk
    assert kept[0] - kept[1] == rows * layer.config.moe_ffn_hidden_size * hidden_SBH.itemsize


def test_no_mask_of_all_experts_is_sorted_on_a_cpu(world):
    (model,) = build_model(tiny_run(MoEConfig()))
    layer = next(module for module in model.modules() if isinstance(module, MoELayer))
    with torch.profiler.profile() as profile:
        layer(torch.randn(12, 2, layer.config.hidden_size))
    assert "aten::sort" not in {event.key for event in profile.key_averages()}
