"""What a modality has of its own: where it is said, where it is stored, and how a checkpoint completes a record."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, DataConfig
from megatron_moellava.costs.shapes import Model, model_from_json
from megatron_moellava.towers import TOWERS, get_tower
from megatron_moellava.towers.branches import (
    Branch,
    branch_problems,
    branches_of_data,
    branches_of_section,
    completed,
    own_tower,
    tower_for,
)
from tests.helpers.modalities import DEPTH, THERMAL
from tests.helpers.paths import GOLDEN

CLIP, SIGLIP = TOWERS["clip-tiny"], TOWERS["siglip-tiny"]
FOLDER = GOLDEN / "assets/google/siglip-tiny"
OWN = replace(DEPTH, tower="siglip-tiny", projector="own")


def section(*branches: Branch) -> dict:
    return Model(backbone=get_backbone("llama-tiny"), tower=CLIP, branches=branches).to_json()


def test_a_record_says_which_tower_sees_its_pictures():
    assert own_tower(OWN) == SIGLIP and tower_for(OWN, CLIP) == SIGLIP
    assert own_tower(DEPTH) is None and tower_for(DEPTH, CLIP) == tower_for(None, CLIP) == CLIP
    assert own_tower(replace(DEPTH, tower=str(FOLDER))) == get_tower(str(FOLDER))
    only = replace(THERMAL, projector="own")
    found = branches_of_data(DataConfig(modalities=(OWN, DEPTH, only)))
    assert found == (
        Branch(modality="depth", tower=SIGLIP, own_projector=True),
        Branch(modality="thermal", own_projector=True),
    )
    assert [branch.seen_by(CLIP) for branch in found] == [SIGLIP, CLIP]


def test_an_unknown_tower_is_named_with_its_record():
    with pytest.raises(ConfigError, match=r"data\.modalities depth: tower='siglip-tin' .* nearest names: siglip-tiny"):
        own_tower(replace(DEPTH, tower="siglip-tin"))


def test_run_json_holds_every_field_and_nothing_of_models_without():
    branches = branches_of_data(DataConfig(modalities=(OWN, replace(THERMAL, projector="own"))))
    stored = section(*branches)
    assert branches_of_section(stored) == branches == model_from_json(stored).branches
    assert "branches" not in section() and branches_of_section(section()) == ()


def test_records_take_from_a_checkpoint_what_they_do_not_say(tmp_path):
    stored = section(
        Branch(modality="depth", tower=SIGLIP, own_projector=True),
        Branch(modality="thermal", tower=replace(SIGLIP, num_layers=3)),
    )
    records = [{"name": "depth"}, {"name": "thermal", "levels": "float"}, {"name": "night", "levels": "colours"}]
    assert completed(records, stored, tmp_path) == [
        {"name": "depth", "tower": "siglip-tiny", "projector": "own"},
        {
            "name": "thermal",
            "levels": "float",
            "tower": str(tmp_path),
        },  # no published size: the checkpoint has the fields
        {"name": "night", "levels": "colours"},
    ]
    said = {"name": "depth", "tower": "clip-tiny", "projector": "shared"}
    gone = {"name": "depth", "tower": f"{tmp_path}/gone"}
    assert completed([said, gone], stored, tmp_path) == [
        said,
        {"name": "depth", "tower": "siglip-tiny", "projector": "own"},
    ]
    assert completed("depth", stored, tmp_path) == "depth", "what is no list is refused by its type, elsewhere"


@pytest.mark.parametrize(
    "here, said",
    [
        ((), "has tower and projector of its own for depth, and data.modalities has no such record; add it"),
        ((Branch(modality="depth", tower=SIGLIP),), r"is another one (projector own there, shared here)"),
        ((Branch(modality="depth", own_projector=True),), "(tower siglip-tiny there, shared here)"),
        (
            (Branch(modality="depth", tower=replace(SIGLIP, image_size=128), own_projector=True),),
            "(tower.image_size 64 there, 128 here); leave `tower` and `projector` out",
        ),
        (
            (
                Branch(modality="depth", tower=replace(SIGLIP, name="mine"), own_projector=True),
                Branch(modality="thermal", own_projector=True),
            ),
            "has no projector of its own for thermal, which data.modalities asks for; make that first: moellava convert "
            "add-modality --modality thermal",
        ),
    ],
    ids=["no record", "projector", "tower", "size", "not made"],
)
def test_a_run_that_contradicts_its_checkpoint_is_told_what_to_do(here, said):
    (problem,) = branch_problems(section(Branch(modality="depth", tower=SIGLIP, own_projector=True)), here)
    assert said in problem
