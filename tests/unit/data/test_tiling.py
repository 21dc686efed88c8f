"""Tiling of high-resolution images, for both towers, against transformers' LLaVA-NeXT processor."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from megatron_moellava.data.tiling import best_grid, num_tiles, tile
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
    batches = take(make_loader(data), 6)
    for batch in batches:
        assert (batch.tokens_BS == -200).sum() == 16 * len(batch.pixel_values_NCHW)
        assert torch.isfinite(batch.pixel_values_NCHW).all()
    assert max(len(batch.pixel_values_NCHW) for batch in batches) >= 3
