"""MoE layers beside Megatron-Core's own."""

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.moe_layer import HereDispatcher, MoELayer, ResidualMoELayer
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
