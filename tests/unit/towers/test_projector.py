"""Kinds of projectors, and the towers that they fit."""

import json
from dataclasses import replace

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.towers import FAMILIES, PROJECTORS, get_tower, tower_fields, tower_from_fields, without_rule


def test_a_pixel_shuffle_makes_a_quarter_of_the_tokens_four_times_as_wide():
    for name in ("siglip2-so400m-patch16-512", "siglip2-so400m-patch16-naflex", "clip-vit-large-patch14-336"):
        plain, shuffled = get_tower(name), get_tower(f"{name}@pixel_shuffle")
        assert shuffled.num_features == plain.num_features / 4
        assert shuffled.projector_input_size == 4 * plain.hidden_size
        assert shuffled.num_rows == plain.num_rows, "the tower itself does what it did"


def test_a_budget_is_whole_visual_tokens():
    tower = replace(get_tower("naflex-tiny@pixel_shuffle"), max_num_patches=250)
    assert (tower.num_features, tower.num_patches, tower.num_rows) == (62, 248, 248)


def test_a_name_without_its_rules():
    for name in (
        "siglip-tiny",
        "siglip-tiny@original",
        "siglip-tiny@pixel_shuffle",
        "siglip-tiny@original@pixel_shuffle",
    ):
        assert without_rule(name) == "siglip-tiny"


@pytest.mark.parametrize(
    "name, message",
    [
        ("siglip-so400m-patch14-384@pixel_shuffle", "27 x 27 patches"),
        ("siglip-tiny@original@pixel_shuffle", "4 x 4 patches less the first"),
        ("naflex-tiny@original", "keeps all of its features"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        get_tower(name)


def test_checkpoints_of_before_know_no_projector():
    assert "projector" not in tower_fields(get_tower("clip-tiny"))
    shuffled = get_tower("siglip-tiny@pixel_shuffle")
    assert tower_fields(shuffled)["projector"] == "pixel_shuffle"
    for tower in (shuffled, get_tower("naflex-tiny"), get_tower("naflex-tiny@pixel_shuffle")):
        assert tower_from_fields(json.loads(json.dumps(tower_fields(tower))), FAMILIES) == tower
    assert set(PROJECTORS) == {"mlp2x_gelu", "pixel_shuffle"}
