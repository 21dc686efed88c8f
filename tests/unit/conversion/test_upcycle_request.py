"""What may be asked of an upcycling."""

import pytest
import torch

from megatron_moellava.config import ConfigError, MoEConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.conversion.upcycle_request import request, vision_request
from tests.helpers.conversion_models import read


def asked(folder, **options) -> MoEConfig:
    defaults = {"num_experts": 4, "topk": None, "placement": None, "residual": False}
    return request(folder, **(defaults | options))


def test_a_granularity_multiplies_experts_and_choices_and_divides_the_width(dense):
    folder, _ = dense
    whole, parts = asked(folder), asked(folder, granularity=4)
    assert (whole.num_moe_experts, whole.moe_router_topk, whole.moe_ffn_hidden_size) == (4, 2, None)
    assert (parts.num_moe_experts, parts.moe_router_topk) == (16, 8)
    assert parts.moe_ffn_hidden_size and asked(folder, granularity=4, topk=1).moe_router_topk == 4
    same = asked(folder, num_experts=16, topk=8, expert_width=parts.moe_ffn_hidden_size)
    assert same == parts
    assert asked(folder, expert_width=parts.moe_ffn_hidden_size * 4) == whole


def test_what_cannot_be_is_refused_before_anything_is_read(dense, tmp_path):
    folder, _ = dense
    with pytest.raises(ConfigError, match="--granularity 1009 does not divide ffn_hidden_size"):
        asked(folder, granularity=1009)
    with pytest.raises(ConfigError, match="give one of them"):
        asked(folder, granularity=2, expert_width=64)
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=MoEConfig())
    with pytest.raises(ConfigError, match="has experts already, whose width stays"):
        asked(tmp_path / "moe", granularity=2)
    width = asked(folder, granularity=4).moe_ffn_hidden_size
    for moe, message in (
        (MoEConfig(moe_ffn_hidden_size=width, num_moe_experts=6), "num_moe_experts=6 must be a multiple of 4"),
        (MoEConfig(moe_ffn_hidden_size=width, num_moe_experts=8), "moe_router_topk=2 must be a multiple of 4"),
        (MoEConfig(moe_ffn_hidden_size=width + 1), "does not divide ffn_hidden_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            upcycle_checkpoint(folder, save=tmp_path / "x", moe=moe)
    with pytest.raises(ConfigError, match=f"moe_ffn_hidden_size={width}, but the checkpoint's experts are"):
        upcycle_checkpoint(tmp_path / "moe", save=tmp_path / "x", moe=MoEConfig(moe_ffn_hidden_size=width))
    with pytest.raises(ConfigError, match=r"drop=1.5 must lie between 0 and 1"):
        upcycle_checkpoint(folder, save=tmp_path / "x", moe=MoEConfig(), drop=1.5)


def test_a_shared_expert_beside_narrow_ones_is_a_copy_of_the_first(dense, tmp_path):
    folder, state = dense
    upcycle_checkpoint(folder, save=tmp_path / "narrow", moe=asked(folder, granularity=4))
    if "model.layers.0.mlp.fc1.bias" in state:
        with pytest.raises(ConfigError, match=r"shared expert: the MLPs of .* have biases"):
            moe = asked(tmp_path / "narrow", num_experts=16, shared_expert=True)
            upcycle_checkpoint(tmp_path / "narrow", save=tmp_path / "shared", moe=moe)
        return
    moe = asked(tmp_path / "narrow", num_experts=16, shared_expert=True)
    assert moe.moe_shared_expert_intermediate_size == moe.moe_ffn_hidden_size
    upcycle_checkpoint(tmp_path / "narrow", save=tmp_path / "shared", moe=moe)
    tensors = open_checkpoint(tmp_path / "shared").tensors
    layer = "language_model.decoder.layers.0.mlp."
    shared, experts = (
        read(tensors[f"{layer}{part}linear_fc1.weight"]) for part in ("shared_experts.", "experts.experts.")
    )
    assert torch.equal(shared, experts[0])
    assert not read(tensors[f"{layer}shared_experts.linear_fc2.weight"]).any()


def test_an_expert_of_weight_1_takes_megatrons_router(dense):
    folder, _ = dense
    moe = asked(folder, topk=1, normalize_top1=True)
    assert moe.normalize_top1 and moe.router == "megatron"


def wanted(**options) -> dict:
    names = ("tower_experts", "tower_topk", "tower_placement", "projector_experts", "projector_topk")
    return vision_request(**(dict.fromkeys(names) | options))


def test_what_is_not_said_of_tower_and_projector_is_cumos():
    assert wanted() == {}
    assert wanted(tower_experts=4, projector_experts=4) == {
        "tower_moe": TowerMoEConfig(),
        "projector_moe": ProjectorMoEConfig(),
    }
    found = wanted(tower_experts=8, tower_topk=1, tower_placement=["0", "2"], normalize_top1=True)
    assert found["tower_moe"] == TowerMoEConfig(
        num_moe_experts=8, moe_router_topk=1, placement=(0, 2), normalize_top1=True
    )
    with pytest.raises(ConfigError, match="--tower-topk describes experts that nobody asked for; give --tower-experts"):
        wanted(tower_topk=2, projector_experts=4)


def test_experts_of_tower_and_projector_are_made_once(dense, tmp_path):
    folder, _ = dense
    for vision, message in (
        ({}, "no experts were asked for"),
        ({"tower_moe": TowerMoEConfig(placement=(7,))}, r"tower_moe.placement=\[7\] must name different layers"),
        ({"projector_moe": ProjectorMoEConfig(moe_router_topk=5)}, "--projector-topk 5 must be between 1 and"),
    ):
        with pytest.raises(ConfigError, match=message):
            upcycle_checkpoint(folder, save=tmp_path / "x", moe=None, **vision)
    upcycle_checkpoint(folder, save=tmp_path / "moe", moe=None, projector_moe=ProjectorMoEConfig())
    with pytest.raises(ConfigError, match="the checkpoint's projector has 4 experts already"):
        more = ProjectorMoEConfig(num_moe_experts=8)
        upcycle_checkpoint(tmp_path / "moe", save=tmp_path / "x", moe=None, projector_moe=more)
