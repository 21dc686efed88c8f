"""Every parameter has one role, and only what a stage trains gets gradients."""

import pytest

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.roles import freeze, parameter_roles
from megatron_moellava.stages import ROLES, STAGES
from tests.helpers.inference_models import tiny_run

MODELS = {"dense": None, "moe": MoEConfig(), "residual": MoEConfig(use_residual=True)}
BACKBONES = ("llama-tiny", "phi-2-tiny", "qwen3-tiny")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_has_one_role(world, kind, backbone):
    (model,) = build_model(tiny_run(MODELS[kind], backbone))
    found = list(parameter_roles(model))
    assert {role for role, *_ in found} <= set(ROLES)
    assert {name: parameter for _, name, parameter in found}.keys() == dict(model.named_parameters()).keys()
    assert len({id(parameter) for *_, parameter in found}) == len(found)


def test_names_say_what_the_roles_are(world):
    (model,) = build_model(tiny_run(MoEConfig(use_residual=True)))
    roles = {name: role for role, name, _ in parameter_roles(model)}
    layer = "language_model.decoder.layers.0"
    assert roles["vision_tower.decoder.layers.0.mlp.linear_fc1.weight"] == "tower"  # where the original matches "fc1"
    assert roles["projector.linear_fc1.weight"] == "projector"
    assert roles["language_model.output_layer.weight"] == "language.embedding"
    assert roles[f"{layer}.self_attention.linear_qkv.weight"] == "language.attention"
    assert roles[f"{layer}.input_layernorm.weight"] == "language.norm"
    assert roles[f"{layer}.mlp.router.weight"] == roles[f"{layer}.mlp.coefficient.bias"] == "router"
    assert roles[f"{layer}.mlp.residual_mlp.linear_fc1.weight"] == "language.ffn"
    assert {role for name, role in roles.items() if f"{layer}.mlp.experts" in name} == {"experts"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_its_roles_and_counts_them(world, stage):
    (model,) = build_model(tiny_run(MoEConfig()))
    trained = freeze(model, STAGES[stage])
    assert trained.keys() <= set(STAGES[stage]) and "projector" in trained
    assert sum(trained.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(p.requires_grad == (role in STAGES[stage]) for role, _, p in parameter_roles(model))
