"""What the pictures and videos of a sample become under a run's data settings: visual tokens, and work for the tower.

Everything follows from the code that loads them (data/media.py, data/pooling.py): native resolution with its budgets, tiles,
frames per video and their pooling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moellava.config import DataConfig
from megatron_moellava.data import tiling
from megatron_moellava.data.media import plans_of_sizes
from megatron_moellava.data.pooling import Frame, widths
from megatron_moellava.data.video import Clip
from megatron_moellava.towers import POOLINGS, Tower

RATE = 25.0  # frames per second of a video; which of them are shown does not depend on it
Size = tuple[int, int]  # width, height in pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """Pictures and frames together, or their mean over samples."""

    tokens: float = 0.0  # visual tokens
    images: float = (
        0.0  # that the tower encodes: pictures, tiles, frames; at native resolution patches / tower.num_patches
    )
    squares: float = 0.0  # at native resolution: patches ** 2, summed over the pictures

    def times(self, count: float) -> "Shown":
        """`count` samples of this kind."""
        return Shown(tokens=self.tokens * count, images=self.images * count, squares=self.squares * count)

    def __add__(self, other: "Shown") -> "Shown":
        return Shown(
            tokens=self.tokens + other.tokens,
            images=self.images + other.images,
            squares=self.squares + other.squares,
        )


def of_pictures(sizes: Sequence[Size], tower: Tower, data: DataConfig) -> Shown:
    """The pictures of one sample."""
    return _shown(list(sizes), [None] * len(sizes), tower, data)


def of_video(seconds: float, tower: Tower, data: DataConfig) -> Shown:
    """One video, which lasts so long."""
    count = num_frames(seconds, data)
    return _shown([None] * count, [(number, count) for number in range(count)], tower, data)


def num_frames(seconds: float, data: DataConfig) -> int:
    """Frames that are shown of a video."""
    return Clip(frames=max(1, round(seconds * RATE)), rate=RATE).num_frames(data)


def _shown(sizes: list[Size | None], frames: list[Frame], tower: Tower, data: DataConfig) -> Shown:
    if not tower.has_grids:
        tiles = [
            tiling.num_tiles(*size, tower.image_size, tower.tiles) if size and data.image_grid else 1 for size in sizes
        ]
        tokens = widths(frames, tiles, tower.num_features, POOLINGS[data.video_pooling])
        return Shown(tokens=sum(tokens), images=sum(tiles))
    plans = plans_of_sizes(sizes, tower, data, "the planned sample")
    visual = sum(plan.tokens for plan in plans)
    if not tower.native:  # an overview, and the tiles that are put together behind it
        return Shown(tokens=visual, images=sum(1 + plan.grid[0] * plan.grid[1] for plan in plans))
    patches = [math.prod(plan.grid) for plan in plans]
    squares = sum(count**2 for count in patches)
    return Shown(tokens=visual, images=sum(patches) / tower.num_patches, squares=squares)
