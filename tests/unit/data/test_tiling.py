"""Tiling of high-resolution images, for both towers, against transformers' LLaVA-NeXT processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from megatron_moellava.data.tiling import best_grid, kept, num_tiles, plan, plans, tile
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS, config, make_loader, make_set, take

TOWERS = {"clip": "openai/clip-tiny", "siglip": "google/siglip-tiny"}


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("size", [(60, 40), (40, 60), (100, 100), (300, 50), (31, 200), (20, 20), (28, 28), (640, 480)])
def test_tiles_equal_llava_next(family, size):
    tower = get_tower(str(ASSETS / TOWERS[family]))
    edge = tower.image_size
    pinpoints = [[edge, 2 * edge], [2 * edge, edge], [2 * edge, 2 * edge], [3 * edge, edge], [edge, 3 * edge]]
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": edge},
        crop_size={"height": edge, "width": edge},
        image_grid_pinpoints=pinpoints,
        image_mean=list(tower.image_mean),
        image_std=list(tower.image_std),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    got = tile(image, tower)
    assert got.shape == expected.shape and len(got) == num_tiles(*size, edge)
    std = np.array(tower.image_std)[:, None, None]
    assert np.abs((got - expected) * std * 255).max() <= 1


def test_wide_images_get_wide_grids():
    assert best_grid(1000, 300, 336) == (3, 1)
    assert best_grid(300, 1000, 336) == (1, 3)
    assert best_grid(800, 800, 336) == (2, 2)


@pytest.mark.parametrize("packing", [True, False])
def test_tokens_match_tiles_in_a_batch(tmp_path, packing):
    data = config(make_set(tmp_path), packing=packing, image_grid=True)
    most = 0
    for batch in take(make_loader(data), 6):
        assert (batch.tokens_BS == -200).sum() == 16 * len(batch.pixel_values_NCHW)
        assert torch.isfinite(batch.pixel_values_NCHW).all()
        most = max(most, len(batch.pixel_values_NCHW))
    assert most >= 3


@pytest.mark.parametrize("seed", range(40))
def test_lines_and_columns_that_show_something_are_transformers(seed):
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(1, 900, 2))
    rows, columns = (int(count) * int(rng.choice([4, 24])) for count in rng.integers(1, 4, 2))
    shown = unpad_image(torch.zeros(1, rows, columns), (height, width))
    assert kept(width, height, rows, columns) == tuple(shown.shape[1:])


def test_a_plan_counts_the_overview_and_every_line_with_its_end():
    tower = get_tower("siglip-tiny@newline")  # 4 x 4 patches of 16 pixels
    made = plan((120, 60), tower)
    assert made.grid == (1, 2, 4, 8) and made.tokens == 16 + 4 * 9
    assert plan(None, tower).tokens == 17
    assert plans([(120, 60), None], tower, True) == (made, plan(None, tower))
    assert plans([(120, 60)], tower, False) == (plan(None, tower),)


def test_onevision_reduces_very_many_features_and_tiles_single_pictures_alone():
    tower = get_tower("siglip-tiny@onevision")
    (large,) = plans([(64 * 6, 64 * 6)], tower, True)
    assert large.grid == (6, 6, 24, 24, 12, 12) and large.tokens == 16 + 12 * 13
    (small,) = plans([(60, 60)], tower, True)
    assert small.grid == (1, 1, 4, 4) and small.tokens == 16 + 4 * 5
    assert plans([(60, 60), (400, 60)], tower, True) == (plan(None, tower),) * 2
