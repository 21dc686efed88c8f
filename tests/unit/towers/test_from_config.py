"""Towers of a folder's config.json and back."""

import json
from dataclasses import replace

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.towers import FAMILIES as TOWER_FAMILIES
from megatron_moellava.towers import TOWERS, get_tower, tower_fields, tower_from_fields
from megatron_moellava.towers.from_config import processor_config_of, published_config_of


def folder_of(tower, tmp_path, **processor) -> str:
    (tmp_path / "config.json").write_text(json.dumps(published_config_of(tower)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config_of(tower) | processor))
    return str(tmp_path)


@pytest.mark.parametrize("tower", ["clip-tiny", "siglip-tiny"])
@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"resample": 0}, r"resample=0: supported are 2 \(bilinear\) and 3 \(bicubic\)"),
        ({"size": {"shortest_edge": 80}}, "size, crop_size: .*80.* instead of image_size="),
        ({"size": 48, "crop_size": 48}, "size, crop_size: 48 instead"),
        ({"do_normalize": False}, "do_normalize=False: only True"),
        ({"do_resize": False, "do_rescale": False}, "do_resize=False.*\n.*do_rescale=False"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0"),
    ],
)
def test_what_a_processor_does_otherwise_is_refused(tower, processor, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        get_tower(folder_of(TOWERS[tower], tmp_path, **processor))


def test_the_interpolation_travels_with_the_tower(tmp_path):
    bilinear = get_tower(folder_of(TOWERS["siglip-tiny"], tmp_path, resample=2))
    assert bilinear.resample == "bilinear" and processor_config_of(bilinear)["resample"] == 2
    assert tower_from_fields(json.loads(json.dumps(tower_fields(bilinear))), TOWER_FAMILIES).resample == "bilinear"
    assert "resample" not in tower_fields(TOWERS["siglip-tiny"]), "checkpoints that were written without it fit"


@pytest.mark.parametrize(
    ("config", "processor", "message"),
    [
        ({"num_patches": 15}, {}, "num_patches=15: must be a square"),
        ({"image_size": 64}, {}, "image_size=64: unknown key"),
        ({}, {"max_num_patches": 0}, "max_num_patches=0: must be a whole number above 0"),
        ({}, {"patch_size": 14}, "patch_size=14 instead of 16"),
        ({}, {"resample": 1}, "resample=1: supported are"),
    ],
)
def test_a_folder_at_native_resolution_says_what_is_wrong_with_it(config, processor, message, tmp_path):
    folder = folder_of(TOWERS["naflex-tiny"], tmp_path, **processor)
    (tmp_path / "config.json").write_text(json.dumps(published_config_of(TOWERS["naflex-tiny"]) | config))
    with pytest.raises(ConfigError, match=message):
        get_tower(folder)


def test_the_budget_of_a_processor_is_the_towers(tmp_path):
    tower = get_tower(folder_of(TOWERS["naflex-tiny"], tmp_path, max_num_patches=1024))
    assert tower.num_features == 1024 and tower.num_positions == 16
    assert processor_config_of(tower)["max_num_patches"] == 1024
    assert get_tower(f"{tmp_path}@pixel_shuffle").num_features == 256
    assert tower_from_fields(json.loads(json.dumps(tower_fields(tower))), TOWER_FAMILIES).num_features == 1024


@pytest.mark.parametrize(
    "form", [{"size": 72, "crop_size": 72}, {"size": {"shortest_edge": 72}, "do_convert_rgb": None}]
)
def test_sizes_are_read_in_the_forms_of_older_files(form, tmp_path):
    assert get_tower(folder_of(TOWERS["clip-tiny"], tmp_path, **form)).resize == "shortest_edge_crop"


@pytest.mark.parametrize("name", TOWERS)
def test_tower_folder_and_fields_give_the_same_tower_back(name, tmp_path):
    tower = TOWERS[name]
    (tmp_path / "config.json").write_text(json.dumps(published_config_of(tower)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config_of(tower)))
    read = get_tower(f"{tmp_path}@original" if tower.drop_first_feature and not tower.class_token else str(tmp_path))
    assert replace(read, name=name, source=tower.source) == tower
    assert tower_from_fields(json.loads(json.dumps(tower_fields(tower))), TOWER_FAMILIES) == tower
