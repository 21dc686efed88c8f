"""Tilings as data."""

from megatron_moellava.towers import TILINGS, get_tower, tower_fields


def test_pinpoints_are_those_of_the_published_configs():
    wide = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert TILINGS["next"].pinpoints(336) == wide
    assert TILINGS["next"].pinpoints(336, wide_first=True) == [pair[::-1] for pair in wide]
    many = TILINGS["onevision"].pinpoints(384)
    assert len(many) == 36 and many[:3] == [[384, 384], [384, 768], [384, 1152]] and many[-1] == [2304, 2304]


def test_a_tower_names_its_tiling_only_where_it_is_another():
    assert "tiling" not in tower_fields(get_tower("siglip-tiny@newline"))
    assert tower_fields(get_tower("siglip-tiny@onevision"))["tiling"] == "onevision"
