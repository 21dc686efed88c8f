"""Points follow pictures, there and back; the pixels themselves are the witness."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_moellava.data import geometry, images, tiling
from megatron_moellava.towers.tiling import TILINGS

EDGE = 224
TOWERS = {
    how: SimpleNamespace(
        image_size=EDGE,
        resize=how,
        resample="bilinear",
        pad_color=(0, 0, 0),
        image_mean=(0.0, 0.0, 0.0),
        image_std=(1.0, 1.0, 1.0),
        tiles=TILINGS["next"],
    )
    for how in ("shortest_edge", "square")
}
ways = st.sampled_from(
    [(how, aspect, grid) for how in TOWERS for aspect in ("pad", "square") for grid in (False, True)]
)
edges = st.integers(1, 3000)


@settings(max_examples=120, deadline=None)
@given(edges, edges, st.integers(0, 9), ways, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_box_comes_back_to_where_it_was(width, height, orientation, way, place):
    """Exactly, up to the rounding of doubles: far below half a pixel."""
    how, aspect, grid = way
    upright = geometry.upright((width, height), orientation)
    seen = geometry.seen(*map(int, upright.size), TOWERS[how], aspect_ratio=aspect, grid=grid)
    both = upright.then(seen)
    box_N2 = np.array(place).reshape(2, 2) * (width, height)
    assert np.abs(both.back(both(box_N2)) - box_N2).max() < 1e-6
    assert np.allclose(both(box_N2), seen(upright(box_N2)), atol=1e-6) and both.size == (EDGE, EDGE)


def found(picture: np.ndarray) -> np.ndarray:
    """[[left, top], [right, bottom]] of what is bright."""
    rows, columns = np.nonzero(picture > 127)
    return np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])


def with_box(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    return image


@pytest.mark.parametrize("how", TOWERS)
@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("size", [(400, 300), (301, 449), (224, 224), (640, 97)])
def test_a_white_box_lies_where_its_corners_went(how, aspect, size):
    tower, (width, height) = TOWERS[how], size
    box = (width // 2 - 30, height // 2 - 20, width // 2 + 35, height // 2 + 30)
    pixels = images.preprocess(with_box(width, height, box), tower, aspect)
    expected = geometry.seen(width, height, tower, aspect_ratio=aspect)(np.array(box, dtype=float).reshape(2, 2))
    assert np.abs(found(pixels[0] * 255) - expected.clip(0, EDGE)).max() <= 0.75  # half a pixel, and the filter's blur


@pytest.mark.parametrize("size", [(400, 300), (301, 449), (900, 200)])
def test_a_white_box_lies_in_its_tiles_and_in_the_overview(size):
    tower, (width, height) = TOWERS["shortest_edge"], size
    box = (width // 2 - 90, height // 2 - 60, width // 2 + 85, height // 2 + 70)
    corners = np.array(box, dtype=float).reshape(2, 2)
    overview, *tiles = tiling.tile(with_box(width, height, box), tower) * 255
    whole = geometry.seen(width, height, tower, aspect_ratio="pad", grid=True)
    assert np.abs(found(overview[0]) - whole(corners)).max() <= 0.75
    maps = geometry.tile_maps(width, height, tiling.best_grid(width, height, EDGE), EDGE)
    assert len(maps) == len(tiles)
    for tile, there in zip(tiles, maps, strict=True):
        inside = there(corners).clip(0, EDGE)
        if (np.ptp(inside, axis=0) > 1).all():
            assert np.abs(found(tile[0]) - inside).max() <= 0.75
        assert np.abs(there.back(there(corners)) - corners).max() < 1e-9


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_turn_is_that_of_the_pixels(orientation):
    image, exif = with_box(60, 40, (10, 5, 30, 12)), Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=exif)
    turned, _ = images.open_image(buffer.getvalue(), "row 1")
    there = images.upright(buffer.getvalue(), "row 1")
    assert there.size == turned.size
    points = there(np.array([[10.0, 5.0], [30.0, 12.0]]))
    assert (found(np.asarray(turned)[:, :, 0]) == np.sort(points, axis=0)).all()


def test_of_a_very_long_picture_the_middle_is_seen():
    tower = TOWERS["shortest_edge"]
    seen = geometry.seen(10_000, 10, tower, aspect_ratio="square")
    assert np.allclose(seen(np.array([[5000.0, 5.0]])), [[EDGE / 2, EDGE / 2]])
