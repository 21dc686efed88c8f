"""Towers of a folder's config.json and back."""

import json
from dataclasses import replace

import pytest

from megatron_moellava.towers import FAMILIES as TOWER_FAMILIES
from megatron_moellava.towers import TOWERS, get_tower, tower_fields, tower_from_fields
from megatron_moellava.towers.from_config import hf_config_of as tower_config_of
from megatron_moellava.towers.from_config import processor_config_of


@pytest.mark.parametrize("name", TOWERS)
def test_tower_folder_and_fields_give_the_same_tower_back(name, tmp_path):
    tower = TOWERS[name]
    (tmp_path / "config.json").write_text(json.dumps(tower_config_of(tower)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config_of(tower)))
    read = get_tower(f"{tmp_path}@original" if tower.drop_first_feature and not tower.class_token else str(tmp_path))
    assert replace(read, name=name, source=tower.source) == tower
    assert tower_from_fields(json.loads(json.dumps(tower_fields(tower))), TOWER_FAMILIES) == tower
