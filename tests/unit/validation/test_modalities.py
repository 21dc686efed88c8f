"""Records of modalities that cannot work, each with a sentence that says what to do."""

from dataclasses import replace

import pytest

from megatron_moellava.config import Channel, DataConfig, Modality
from megatron_moellava.towers import TOWERS, get_tower
from megatron_moellava.validation.modalities import modality_problems, way_problems
from tests.helpers.modalities import DEPTH, THERMAL

COLOUR = Modality(name="nightvision", levels="colours", formats=("JPEG",))
WRONG = {
    "name": ((replace(DEPTH, name="Depth map"),), "data.modalities[0].name='Depth map' must be lower-case letters"),
    "a key": ((replace(DEPTH, name="tag"),), "data.modalities[0].name=tag is a key that rows have for something else"),
    "passed over": ((replace(DEPTH, name="ignored"),), "data.modalities[0].name=ignored is a key"),
    "twice": ((DEPTH, DEPTH), "data.modalities[1].name=depth is there twice"),
    "no channel": ((THERMAL, replace(DEPTH, channels=())), "data.modalities[1].channels has 0 entries; give one"),
    "two channels": ((replace(DEPTH, channels=DEPTH.channels * 2),), "channels has 2 entries"),
    "no range": ((replace(DEPTH, channels=(Channel(black=1, white=1),)),), "channels[0]: black=1, white=1 must differ"),
    "endless": ((replace(DEPTH, channels=(Channel(black=float("inf"), white=1),)),), "must be finite numbers"),
    "log of 0": ((replace(DEPTH, channels=(Channel(black=0, white=1, curve="log"),)),), "positive with curve=log"),
    "scale": ((replace(DEPTH, scale=0.0),), "data.modalities[0].scale=0.0 must be a number other than 0"),
    "offset": ((replace(DEPTH, offset=float("nan")),), "data.modalities[0].offset=nan must be a finite number"),
    "missing": ((replace(DEPTH, missing=(float("nan"),)),), "NaN is missing in any case"),
    "shown": ((replace(DEPTH, missing_shown=256),), "missing_shown=256 must lie between 0 and 255"),
    "colours": ((replace(COLOUR, scale=2.0),), "data.modalities[0].scale: colours are shown as they are"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_with_field_and_way_out(name):
    modalities, message = WRONG[name]
    said = "\n".join(modality_problems(DataConfig(modalities=modalities, ignore_keys=("ignored",))))
    assert message in said


def test_good_records_are_not_touched():
    assert not [*modality_problems(DataConfig(modalities=(DEPTH, THERMAL, COLOUR)))]
    assert not [*modality_problems(DataConfig())]


def test_the_originals_order_knows_no_modalities():
    (said,) = modality_problems(DataConfig(modalities=(DEPTH,), sampler="modality_length"))
    assert said.startswith("data.sampler=modality_length")


WAYS = {
    "unknown": ({"tower": "clip-tin"}, "clip-tiny", "data.modalities depth: tower='clip-tin' is neither"),
    "width": (
        {"tower": "siglip-tiny"},
        "clip-tiny",
        "data.modalities[0].tower=siglip-tiny: its features are 128 wide, and those of model.tower 96, so that they cannot "
        "share a projector; set data.modalities[0].projector to own",
    ),
    "kind": ({"tower": "siglip-tiny@pixel_shuffle"}, "siglip-tiny", "cannot share a projector"),
    "native": (
        {"tower": "naflex-tiny", "projector": "own"},
        "clip-tiny",
        "data.modalities[0]: what a modality has of its own takes pictures of one size, and naflex-tiny gives",
    ),
    "beside native": (
        {"projector": "own"},
        "naflex-tiny",
        "takes pictures of one size, and naflex-tiny gives pictures",
    ),
    "beside tiles put together": (
        {"projector": "own"},
        "siglip-tiny@newline",
        "and siglip-tiny@newline gives pictures",
    ),
    "for videos": (
        {"tower": "languagebind-video-tiny", "projector": "own"},
        "clip-tiny",
        "tower=languagebind-video-tiny: it takes whole videos, and a modality has pictures",
    ),
}


@pytest.mark.parametrize("main", ["naflex-tiny", "siglip-tiny@newline", "languagebind-video-tiny"])
def test_a_tower_of_ones_own_stands_beside_any_other(main):
    record = replace(DEPTH, tower="clip-tiny", projector="own")
    assert not [*way_problems(DataConfig(modalities=(record,)), get_tower(main))]


@pytest.mark.parametrize("name", WAYS)
def test_towers_that_do_not_fit_are_refused_with_the_way_out(name):
    fields, tower, message = WAYS[name]
    (said,) = way_problems(DataConfig(modalities=(replace(DEPTH, **fields),)), get_tower(tower))
    assert message in said


@pytest.mark.parametrize(
    "fields", [{"projector": "own"}, {"tower": "clip-tiny"}, {"tower": "siglip-tiny", "projector": "own"}]
)
def test_towers_and_projectors_that_fit_are_not_touched(fields):
    assert not [*way_problems(DataConfig(modalities=(THERMAL, replace(DEPTH, **fields))), TOWERS["clip-tiny"])]
