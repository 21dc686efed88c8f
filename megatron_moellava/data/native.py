"""Pictures at native resolution, for towers whose patch grids follow each picture (SigLIP 2 NaFlex).

A picture keeps its shape: it is resized so that both sides are whole visual tokens and their number is as large as its budget
allows, by the rule of transformers' Siglip2ImageProcessor (its `max_num_patches` is the budget). With a pixel shuffle a visual
token is 2 x 2 patches, and the rule is the same with units twice as wide.

Budgets count visual tokens: `data.max_image_tokens` of one picture (`towers.tower_of_run` puts it into the tower), and
`data.max_sample_image_tokens` of all pictures of a sample, where the larger ones give way first. With
`data.enlarge_images=false` no picture gets more tokens than it has pixels for.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from megatron_moellava.data.images import normalise, pad_to_square, resampling
from megatron_moellava.data.plan import Plan
from megatron_moellava.data.sample import BadSample

PRECISION = 1e-5  # of the scale that the processor searches, between a millionth and LARGEST
LARGEST = 100.0


def plans(sizes: Sequence[tuple[int, int] | None], tower, data, where: str) -> tuple[Plan, ...]:
    """What becomes of the pictures of one sample, by their (width, height); None: a frame of a video, which is made square.

    Raises BadSample where they are more than `data.max_sample_image_tokens`.
    """
    wanted = [_wanted(size, tower, data.enlarge_images) for size in sizes]
    limit = data.max_sample_image_tokens
    if limit and len(sizes) > limit:
        raise BadSample(
            "too many images",
            f"{where}: {len(sizes)} images, and data.max_sample_image_tokens={limit} has not one visual token for each; raise "
            "it, or split the row",
        )
    unit = tower.patch_size * tower.shuffle
    found = []
    for size, budget in zip(sizes, shared_budget(wanted, limit) if limit else wanted, strict=True):
        width, height = size or (unit, unit)
        rows, columns = grid(width, height, unit, budget)
        found.append(Plan(rows * columns, (rows * tower.shuffle, columns * tower.shuffle)))
    return tuple(found)


def _wanted(size: tuple[int, int] | None, tower, enlarge: bool) -> int:
    if size is None or enlarge:
        return tower.num_features
    unit = tower.patch_size * tower.shuffle
    return min(tower.num_features, math.ceil(size[0] / unit) * math.ceil(size[1] / unit))


def shared_budget(wanted: Sequence[int], limit: int) -> list[int]:
    """As much for each as it wants, as long as the sum allows; those that want most give way first, to one level.

    >>> shared_budget([100, 20, 90], 140)
    [60, 20, 60]
    """
    level, left = limit, limit
    for count, want in zip(range(len(wanted), 0, -1), sorted(wanted), strict=True):
        level = left // count
        if want > level:
            break
        left -= want
    return [min(want, level) for want in wanted] if sum(wanted) > limit else list(wanted)


def grid(width: int, height: int, unit: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of units that a picture is resized to: the largest of its shape with at most `budget` in all.

    Sides are rounded up to whole units. The scale is searched as the processor does it, to the same precision, since
    another search would end on the other side of a rounding here and there.

    >>> grid(640, 480, 16, 256)
    (13, 18)
    """

    def sides(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / unit)) for side in (height, width))
        return rows, columns

    low, high = PRECISION / 10, LARGEST
    while high - low >= PRECISION:
        scale = (low + high) / 2
        if math.prod(sides(scale)) <= budget:
            low = scale
        else:
            high = scale
    return sides(low)


def whole(patches_PCHW: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The first picture [3, H, W] of a row of patches, from its rows and columns of patches: the inverse of `patches`."""
    (rows, columns), side = shape, patches_PCHW.shape[-1]
    blocks = patches_PCHW[: rows * columns].reshape(rows, columns, 3, side, side)
    return blocks.transpose(2, 0, 3, 1, 4).reshape(3, rows * side, columns * side)


def patches(image: Image.Image, tower, plan: Plan, is_frame: bool = False) -> np.ndarray:
    """Normalised patches [P, 3, patch_size, patch_size], row by row. A frame of a video is padded to a square first."""
    if is_frame:
        image = pad_to_square(image, tower.pad_color)
    side, (rows, columns) = tower.patch_size, plan.grid
    pixels_CHW = normalise(image.resize((columns * side, rows * side), resampling(tower)), tower)
    blocks = pixels_CHW.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(blocks).reshape(rows * columns, 3, side, side)
