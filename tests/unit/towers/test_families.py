"""The published towers."""

from megatron_moellava.towers import get_tower


def test_visual_tokens_of_the_published_towers():
    assert get_tower("clip-vit-large-patch14-336").num_features == 576
    assert get_tower("siglip-so400m-patch14-384").num_features == 729
    assert get_tower("siglip-so400m-patch14-384@original").num_features == 728
    assert get_tower("clip-vit-large-patch14-336").num_used_layers == 23
    assert get_tower("siglip2-so400m-patch16-naflex").num_features == 256
    assert get_tower("siglip2-so400m-patch16-naflex").num_used_layers == 27, "features are those after the last layer"
    assert get_tower("clip-vit-large-patch14-336").pad_color == (122, 116, 104)
