"""Ways to pool the frames of a video."""

import typing

from megatron_moellava.config import DataConfig
from megatron_moellava.towers import POOLINGS


def test_blocks_that_are_not_whole_are_left_out():
    assert POOLINGS["2x2"].width(729) == 169 and POOLINGS["2x2"].width(576) == 144
    assert POOLINGS["none"].width(576) == 576


def test_every_setting_has_its_way():
    assert set(typing.get_args(typing.get_type_hints(DataConfig)["video_pooling"])) == set(POOLINGS)
