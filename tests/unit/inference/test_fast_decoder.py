"""The decoder spelt out: every MLP gives what its module gives (tests/unit/inference/test_engine.py: whole answers)."""

import pytest
import torch

from megatron_moellava.inference import fast_decoder
from megatron_moellava.inference.packed_linear import PackedLinear
from megatron_moellava.model.build import build_model
from megatron_moellava.model.experts import GroupedLinear
from megatron_moellava.model.router import MegatronRouter
from tests.helpers.inference_models import GATES, scatter, tiny_run


def mlp_of(gate: str, backbone: str = "llama-tiny"):
    (model,) = build_model(tiny_run(GATES[gate], backbone))
    scatter(model)
    for module in model.eval().requires_grad_(False).modules():
        if isinstance(module, GroupedLinear):
            module.fuse()
    return model.language_model.decoder.layers[0].mlp


@torch.no_grad()
@pytest.mark.parametrize("tokens", [3, 40], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize(
    ("gate", "backbone"),
    [
        *((gate, "llama-tiny") for gate in ("dense", "megatron", "residual", "one choice", "sequential experts")),
        *((gate, "phi-2-tiny") for gate in ("dense", "megatron", "residual", "sequential experts")),  # with biases
        ("shared experts", "llama-tiny"),
    ],
)
def test_a_layers_mlp_is_what_its_module_computes(world, gate, backbone, tokens):
    mlp = mlp_of(gate, backbone)
    x_TH = torch.randn(tokens, mlp.config.hidden_size)
    output_T1H, bias_H = mlp(x_TH.unsqueeze(1))
    expected_TH = output_T1H.squeeze(1) + (0 if bias_H is None else bias_H)
    given_TH = fast_decoder.feed_forward(PackedLinear(packs=False), mlp, x_TH)
    assert torch.allclose(given_TH, expected_TH, atol=1e-4), (given_TH - expected_TH).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("gate", ["megatron", "one choice", "balanced by a bias"])
def test_choices_are_the_routers(world, gate):
    mlp = mlp_of(gate)
    router = next(module for module in mlp.modules() if isinstance(module, MegatronRouter))
    x_TH = torch.randn(7, mlp.config.hidden_size)
    weights_TK, experts_TK = fast_decoder.choices(router, x_TH)
    probs_TE, map_TE = router(x_TH.unsqueeze(1))
    assert torch.allclose(torch.zeros_like(probs_TE).scatter(1, experts_TK, weights_TK), probs_TE, atol=1e-6)
    assert experts_TK.sort(dim=1).values.tolist() == [row.nonzero().flatten().tolist() for row in map_TE]


def test_only_plain_grouped_experts_are_spelt_out(world):
    assert fast_decoder.is_plain(mlp_of("megatron"))
    assert not fast_decoder.is_plain(mlp_of("shared experts"))
    assert not fast_decoder.is_plain(mlp_of("sequential experts"))
    assert fast_decoder.can_decode_fast()
