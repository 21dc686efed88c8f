"""Where a point of a picture goes on the way into a tower: EXIF turn, pad, crop, tiles, resize; and back.

Coordinates count the corners of pixels: a picture of width W reaches from 0 to W, whatever is done to it. Every step is an
exchange of x and y at most, a factor and a shift for each axis, so it goes back as exactly as it goes forth. images.py and
tiling.py take their numbers from here, so that boxes cannot follow another way than pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MAX_ASPECT = 64  # a longer image would make the shortest-edge resize explode; its middle is used
TURNS = {  # EXIF's orientation -> (x and y change places, then flipped left to right, then top to bottom)
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
Size = tuple[int, int]  # (width, height)


@dataclass(frozen=True, kw_only=True, slots=True)
class Map:
    """Points [N, 2] of one picture -> points of another."""

    size: tuple[float, float]  # (width, height) of the other
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    swapped: bool = False  # x and y change places first

    def __call__(self, points_N2: np.ndarray) -> np.ndarray:
        """The points in the other picture."""
        turned = points_N2[:, ::-1] if self.swapped else points_N2
        return turned * np.array(self.scale) + np.array(self.shift)

    def back(self, points_N2: np.ndarray) -> np.ndarray:
        """Points of the other picture in the first one."""
        turned = (points_N2 - np.array(self.shift)) / np.array(self.scale)
        return turned[:, ::-1] if self.swapped else turned

    def then(self, other: Map) -> Map:
        """This one, and `other` after it."""
        scale, shift = (pair[::-1] if other.swapped else pair for pair in (self.scale, self.shift))
        (a, b), (c, d) = other.scale, other.shift
        return Map(
            size=other.size,
            scale=(scale[0] * a, scale[1] * b),
            shift=(shift[0] * a + c, shift[1] * b + d),
            swapped=self.swapped != other.swapped,
        )


def upright(stored: Size, orientation: int) -> Map:
    """Of the picture as its file stores it -> as people see it, by EXIF's orientation (1: as it is)."""
    swapped, mirrored, flipped = TURNS.get(orientation, TURNS[1])
    width, height = stored[::-1] if swapped else stored
    return Map(
        size=(width, height),
        scale=(-1.0 if mirrored else 1.0, -1.0 if flipped else 1.0),
        shift=(width if mirrored else 0.0, height if flipped else 0.0),
        swapped=swapped,
    )


def padded(width: int, height: int) -> Map:
    """Onto a square, centred; the odd pixel goes to the right or below."""
    side = max(width, height)
    return Map(size=(side, side), shift=((side - width) // 2, (side - height) // 2))


def scaled(old: tuple[float, float], new: Size) -> Map:
    """To another size."""
    return Map(size=new, scale=(new[0] / old[0], new[1] / old[1]))


def middle(old: Size, new: Size) -> Map:
    """The middle of it alone: what is cut off has points below 0 or beyond the size."""
    return Map(size=new, shift=(-((old[0] - new[0]) // 2), -((old[1] - new[1]) // 2)))


def shortest_edge(width: int, height: int, size: int) -> tuple[Size, Size]:
    """(middle that is kept, size to which that is scaled) of a picture whose shorter edge becomes `size`."""
    longest = MAX_ASPECT * min(width, height)
    kept = min(width, longest), min(height, longest)
    long = int(size * max(kept) / min(kept))
    return kept, ((size, long) if width < height else (long, size))


def resized(width: int, height: int, tower) -> Map:
    """To the tower's size: shortest edge and centre crop, or squashed where the tower says "square"."""
    square = (tower.image_size, tower.image_size)
    if tower.resize == "square" or width == height:
        return scaled((width, height), square)
    kept, shape = shortest_edge(width, height, tower.image_size)
    return middle((width, height), kept).then(scaled(kept, shape)).then(middle(shape, square))


def fitting(width: int, height: int, wide: int, high: int) -> Size:
    """The largest size of this shape that fits."""
    across, down = wide / width, high / height
    if across < down:
        return wide, min(math.ceil(height * across), high)
    return min(math.ceil(width * down), wide), high


def tile_maps(width: int, height: int, grid: Size, size: int) -> list[Map]:
    """Into each tile of a grid of (columns, rows), row by row: scaled to fit, centred, cut."""
    wide, high = grid[0] * size, grid[1] * size
    shape = fitting(width, height, wide, high)
    shift = ((wide - shape[0]) // 2, (high - shape[1]) // 2)
    canvas = scaled((width, height), shape).then(Map(size=(wide, high), shift=shift))
    corners = [(left * size, top * size) for top in range(grid[1]) for left in range(grid[0])]
    return [canvas.then(Map(size=(size, size), shift=(-left, -top))) for left, top in corners]


def seen(width: int, height: int, tower, *, aspect_ratio: str, grid: bool = False) -> Map:
    """From an upright picture to what the tower sees of it; with tiles, that is the overview."""
    if grid:
        return scaled((width, height), (tower.image_size, tower.image_size))
    if aspect_ratio != "pad":
        return resized(width, height, tower)
    square = padded(width, height)
    side = max(width, height)
    return square.then(resized(side, side, tower))
