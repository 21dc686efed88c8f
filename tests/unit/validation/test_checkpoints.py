"""What a checkpoint's description and a run contradict each other in."""

import json

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import MoEConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower
from megatron_moellava.validation.checkpoints import differing_fields
from megatron_moellava.validation.run import model_names
from tests.helpers.inference_models import tiny_checkpoint

HERE = get_backbone("llama-tiny"), get_tower("clip-tiny")


def model_with(moe: MoEConfig | None, **vision) -> Model:
    return Model(backbone=HERE[0], tower=HERE[1], moe=moe, **vision)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("run")) / "iter_0000001"


def test_fields_that_change_no_shape_are_compared_too(saved):
    stored = json.loads((saved / "run.json").read_text())["model"]
    assert differing_fields(stored, model_with(MoEConfig())) == []
    stored["backbone_fields"]["rotary_base"] = 5.0
    stored["backbone_fields"]["template"] = "another"  # no part of what the weights mean
    assert differing_fields(stored, model_with(MoEConfig())) == [
        f"backbone.rotary_base 5.0 there, {HERE[0].rotary_base} here"
    ]


def test_experts_are_compared_by_what_their_tensors_depend_on(saved):
    stored = json.loads((saved / "run.json").read_text())["model"]
    assert differing_fields(stored, model_with(MoEConfig(moe_aux_loss_coeff=0.5))) == []
    assert differing_fields(stored, model_with(MoEConfig(placement=(0, 2)))) == [], "the same layers by another name"
    assert differing_fields(stored, model_with(MoEConfig(placement="dense"))) == [
        "moe.layers [0, 2] there, [0, 1, 2, 3] here"
    ]
    assert differing_fields(stored, model_with(None)) == ["moe.num_moe_experts 4 there, None here"]


def test_a_known_model_keeps_its_name_and_a_changed_one_is_the_checkpoint_itself(saved, tmp_path):
    assert model_names(saved) == {"backbone": "llama-tiny", "tower": "clip-tiny"}
    changed = json.loads((saved / "run.json").read_text())
    changed.pop("checksum")
    changed["model"]["backbone_fields"]["rotary_base"] = 5.0
    (tmp_path / "run.json").write_text(json.dumps(changed))
    assert model_names(tmp_path) == {"backbone": str(tmp_path), "tower": "clip-tiny"}


def test_experts_of_tower_and_projector_are_compared_too(saved):
    stored = json.loads((saved / "run.json").read_text())["model"]
    assert differing_fields(stored, model_with(MoEConfig(), projector_moe=ProjectorMoEConfig())) == [
        "projector_moe.num_moe_experts None there, 4 here"
    ]
    stored["tower_moe"] = {"num_moe_experts": 4, "moe_router_topk": 2, "placement": "dense"}
    assert differing_fields(stored, model_with(MoEConfig(), tower_moe=TowerMoEConfig(moe_aux_loss_coeff=0.5))) == []
    assert differing_fields(stored, model_with(MoEConfig(), tower_moe=TowerMoEConfig(placement=(1,)))) == [
        "tower_moe.layers [0, 1] there, [1] here"
    ]
    assert differing_fields(stored, model_with(MoEConfig())) == ["tower_moe.num_moe_experts 4 there, None here"]
