"""The residual MoE layer."""

import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.moe_layer import ResidualMoELayer
from tests.helpers.inference_models import tiny_run

from megatron.core.transformer.moe.moe_layer import MoELayer


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
