"""LLaVA-NeXT's tiling ("anyres"): a high-resolution image as an overview and a grid of full-size tiles.

The grid that keeps most of the image wins, the one with less padding among equals. Tokens are the features of the
overview and of each tile, one after the other (LLaVA-NeXT's patch merge "flat").
"""

import numpy as np
from PIL import Image

from megatron_moellava.data.geometry import fitting
from megatron_moellava.data.images import normalise, resampling

GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))  # columns x rows; among equals the first, as in transformers


def best_grid(width: int, height: int, size: int) -> tuple[int, int]:
    """(columns, rows) for an image, with tiles of size x size."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        wide, high = grid[0] * size, grid[1] * size
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - wide * high

    return max(GRIDS, key=merit)


def num_tiles(width: int, height: int, size: int) -> int:
    """Overview included."""
    columns, rows = best_grid(width, height, size)
    return 1 + columns * rows


def tile(image: Image.Image, tower) -> np.ndarray:
    """Normalised pixels [T, 3, H, W]: overview, then tiles row by row."""
    size = tower.image_size
    columns, rows = best_grid(image.width, image.height, size)
    canvas = _fit(image, columns * size, rows * size, resampling(tower))
    corners = [(left * size, top * size) for top in range(rows) for left in range(columns)]
    tiles = [canvas.crop((left, top, left + size, top + size)) for left, top in corners]
    overview = image.resize((size, size), resampling(tower))
    return np.stack([normalise(part, tower) for part in (overview, *tiles)])


def _fit(image: Image.Image, width: int, height: int, how: Image.Resampling) -> Image.Image:
    """As large as fits, aspect kept, centred on black."""
    shape = fitting(image.width, image.height, width, height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(shape, how), ((width - shape[0]) // 2, (height - shape[1]) // 2))
    return canvas
