"""Every tensor of a model, from its sizes alone; a built model is the independent witness."""

import pytest

from megatron_moellava.backbones import FAMILIES, get_backbone
from megatron_moellava.config import MoEConfig
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
