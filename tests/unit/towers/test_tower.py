"""What follows from a tower's fields."""

from dataclasses import replace

import pytest

from megatron_moellava.towers import TOWERS, get_tower


def test_features_are_patches_and_class_token_less_what_is_dropped():
    clip = get_tower("clip-vit-large-patch14-336")
    assert (clip.num_patches, clip.num_positions, clip.num_features) == (576, 577, 576)
    assert replace(clip, drop_first_feature=False).num_features == 577
    assert replace(clip, class_token=False).num_features == 575


@pytest.mark.parametrize(("feature_layer", "used"), [(-2, 23), (-1, 24), (0, 0), (5, 5)])
def test_layers_beyond_the_feature_are_not_needed(feature_layer, used):
    clip = get_tower("clip-vit-large-patch14-336")
    assert replace(clip, feature_layer=feature_layer).num_used_layers == used


def test_padding_has_the_mean_colour_rounded_down():
    assert replace(get_tower("clip-tiny"), image_mean=(0.5, 0.0, 0.999)).pad_color == (127, 0, 254)


@pytest.mark.parametrize("name", TOWERS)
def test_patches_tile_the_picture_and_heads_the_width(name):
    tower = TOWERS[name]
    assert tower.image_size // tower.patch_size >= 1 and tower.pixel_shape[0] == 3
    assert tower.heads.kv_channels * tower.num_attention_heads == tower.hidden_size
