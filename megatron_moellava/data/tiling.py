"""LLaVA-NeXT's tiling ("anyres"): a high-resolution image as an overview and a grid of full-size tiles.

The grid that keeps most of the image wins, the one with less padding among equals. Tokens are the features of the
overview and of each tile, one after the other (LLaVA-NeXT's patch merge "flat"); or, with a tower of the rule `@newline`, the
overview's and then those of the whole picture line by line: tiles put together, the lines and columns that only pad left
out, each line ended by a learned row ("spatial_unpad"); with `@onevision` reduced before that where they are very many.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_moellava.data.geometry import fitting
from megatron_moellava.data.images import normalise, resampling
from megatron_moellava.data.plan import Plan
from megatron_moellava.towers.tiling import TILINGS, Tiling

NEXT = TILINGS["next"]
REDUCED = 1.1  # features are interpolated where a side would shrink by more, as transformers does it


def best_grid(width: int, height: int, size: int, tiling: Tiling = NEXT) -> tuple[int, int]:
    """(columns, rows) for an image, with tiles of size x size."""

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        wide, high = grid[0] * size, grid[1] * size
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - wide * high

    return max(tiling.grids, key=merit)


def num_tiles(width: int, height: int, size: int, tiling: Tiling = NEXT) -> int:
    """Overview included."""
    columns, rows = best_grid(width, height, size, tiling)
    return 1 + columns * rows


def plans(sizes: Sequence[tuple[int, int] | None], tower, tiled: bool) -> tuple[Plan, ...]:
    """What becomes of the pictures of a sample with a tower of the rule `@newline` or `@onevision`, by their (width, height).

    None: a frame of a video, which is not tiled.
    """
    tiled = tiled and not (tower.tiles.single_only and len(sizes) > 1)
    return tuple(plan(size if tiled else None, tower) for size in sizes)


def plan(size: tuple[int, int] | None, tower) -> Plan:
    """What becomes of one picture; None: it is not tiled."""
    features, side, tiling = tower.num_features, tower.feature_side, tower.tiles
    if size is None:
        return Plan(features + 1, (0, 0, 0, 0))
    columns, rows = best_grid(*size, tower.image_size, tiling)
    high, wide = shown = kept(*size, rows * side, columns * side)
    if tiling.max_tiles and (ratio := math.sqrt(high * wide / (tiling.max_tiles * side**2))) > REDUCED:
        shown = int(high // ratio), int(wide // ratio)
        return Plan(features + shown[0] * (shown[1] + 1), (rows, columns, high, wide, *shown))
    return Plan(features + high * (wide + 1), (rows, columns, high, wide))


def kept(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of features that show a picture which was fitted into rows x columns of them, as transformers counts.

    >>> kept(640, 480, 48, 48)
    (36, 48)
    """
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        return rows - (rows - shown) // 2 * 2, columns
    shown = int(round(width * (rows / height), 7))
    return rows, columns - (columns - shown) // 2 * 2


def tile(image: Image.Image, tower) -> np.ndarray:
    """Normalised pixels [T, 3, H, W]: overview, then tiles row by row."""
    size = tower.image_size
    columns, rows = best_grid(image.width, image.height, size, tower.tiles)
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
