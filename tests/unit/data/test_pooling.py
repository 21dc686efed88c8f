"""How many visual tokens the frames of videos become."""

import pytest

from megatron_moellava.data.pooling import pools, widths
from megatron_moellava.towers import POOLINGS

FRAMES = [None, (0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (0, 1), None]
TILES = [3, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", (48, 16, 16, 16, 16, 16, 16, 16)),
        ("2x2", (48, 4, 4, 4, 4, 4, 4, 16)),
        ("2x2x2", (48, 4, 0, 4, 0, 4, 4, 16)),
    ],
)
def test_frames_shrink_and_pictures_do_not(name, expected):
    assert widths(FRAMES, TILES, 16, POOLINGS[name]) == expected


def test_groups_begin_anew_with_each_video_and_say_what_belongs_together():
    assert pools(FRAMES, TILES, POOLINGS["none"]) == ()
    assert pools(FRAMES, TILES, POOLINGS["2x2x2"]) == (*[(1, 1)] * 3, (2, 2), (2, 2), (1, 2), (1, 2), (1, 1))
    assert pools([(0, 2), (1, 2)], [1, 1], POOLINGS["2x2"]) == ((1, 2), (1, 2))
