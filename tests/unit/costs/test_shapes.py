"""Every tensor of a model, from its sizes alone; a built model is the independent witness."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import FAMILIES, get_backbone
from megatron_moellava.config import MoEConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.costs.parameters import activated_parameters, whole_parameters
from megatron_moellava.costs.shapes import Model, megatron_tensors, model_from_json, model_tensors
from megatron_moellava.model.build import build_model
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.towers import get_tower
from tests.helpers.inference_models import GATES, tiny_run

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

TINY = [next(size.name for size in family.SIZES if "tiny" in size.name) for family in FAMILIES]


def described(backbone: str, moe: MoEConfig | None) -> Model:
    return Model(backbone=get_backbone(backbone), tower=get_tower("clip-tiny"), moe=moe)


@pytest.mark.parametrize("backbone", TINY)
def test_names_and_sizes_are_those_of_a_built_model(world, backbone):
    (built,) = build_model(tiny_run(None, backbone))
    state = built.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    keys = {value.key for value in nested_values(state) if isinstance(value, ShardedBase)}
    listed = model_tensors(described(backbone, None))
    assert {key for key in keys if "_extra_state" not in key} == listed.keys()
    assert sum(tensor.size for tensor in listed.values()) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    "gate",
    [
        "megatron",
        "residual",
        "shared experts",
        "balanced by a bias",
        "scaled, of the best groups, a gated shared expert",
    ],
)
def test_experts_are_listed_with_their_role(world, gate):
    (built,) = build_model(tiny_run(GATES[gate]))
    listed = model_tensors(described("llama-tiny", GATES[gate]))
    sizes: dict[str, int] = {}
    for tensor in listed.values():
        sizes[tensor.role] = sizes.get(tensor.role, 0) + tensor.size * tensor.is_parameter
    counted: dict[str, int] = {}
    for role, _, parameter in parameter_roles(built):
        counted[role] = counted.get(role, 0) + parameter.numel()
    assert sizes == counted


def test_expert_tensors_count_experts_first_and_are_divided_by_them():
    fc1 = model_tensors(described("llama-tiny", MoEConfig()))[
        "language_model.decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    ]
    backbone = get_backbone("llama-tiny")
    assert fc1.shape == (4, 2 * backbone.ffn_hidden_size, backbone.hidden_size)
    assert (fc1.is_expert, fc1.split, fc1.role) == (True, 1, "experts")


def test_a_model_comes_back_from_json():
    for moe in (None, MoEConfig(num_moe_experts=6)):
        model = described("qwen3-tiny", moe)
        assert model_from_json(model.to_json()) == model
    alone = Model(backbone=get_backbone("llama-tiny"))
    assert model_from_json(alone.to_json()) == alone
    assert not any(name.startswith(("vision_tower", "projector")) for name in megatron_tensors(alone))


@pytest.mark.parametrize("tower", ["clip-tiny", "siglip-tiny@newline"])
def test_experts_of_tower_and_projector_are_those_of_a_built_model(world, tower):
    vision = {"tower_moe": TowerMoEConfig(placement=(1,)), "projector_moe": ProjectorMoEConfig(num_moe_experts=3)}
    model = Model(backbone=get_backbone("llama-tiny"), tower=get_tower(tower), **vision)
    (built,) = build_model(replace(tiny_run(None, tower=tower), **vision))
    state = built.sharded_state_dict(metadata={"non_homogeneous_layers": True, "dp_cp_group": None})
    keys = {value.key for value in nested_values(state) if isinstance(value, ShardedBase)}
    assert {key for key in keys if "_extra_state" not in key} == model_tensors(model).keys()
    counted: dict[str, int] = {}
    for role, _, parameter in parameter_roles(built):
        counted[role] = counted.get(role, 0) + parameter.numel()
    assert whole_parameters(model) == counted
    fc2 = model_tensors(model)["projector.experts.experts.linear_fc2.weight"]
    assert fc2.shape == (3, 128, 128) and (fc2.split, fc2.is_expert, fc2.role) == (2, True, "projector")
    plain = replace(model, tower_moe=None, projector_moe=None)
    one, router = (
        whole_parameters(plain),
        {"tower": 4 * model.tower.hidden_size, "projector": 3 * model.tower.projector_input_size},
    )
    newline = 128 if model.tower.newline else 0
    activated = activated_parameters(model)
    assert activated["projector"] == 2 * (one["projector"] - newline) + newline + router["projector"]
    mlp = sum(p.numel() for p in built.vision_tower.decoder.layers[0].mlp.parameters())
    assert activated["tower"] == one["tower"] + mlp + router["tower"]
    assert model_from_json(model.to_json()) == model and "tower_moe" not in plain.to_json()
