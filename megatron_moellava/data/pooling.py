"""How many visual tokens the frames of a video become, where blocks of neighbours in space and time are averaged.

The frames of a block in time are a group: all its visual tokens stand where its first frame stands. Pictures are groups of
their own and are never pooled.
"""

from collections.abc import Sequence

from megatron_moellava.towers.pooling import POOLINGS, Pooling

Frame = tuple[int, int] | None  # (i, n): the i-th of n frames of a video; None: a picture
Pools = tuple[tuple[int, int], ...]  # (images, side of the blocks in space) of each group; empty: nothing is pooled
ALONE = (1, 1)  # a picture, or one tile of it


def widths(frames: Sequence[Frame], tiles: Sequence[int], num_features: int, pooling: Pooling) -> tuple[int, ...]:
    """Visual tokens of each image: none of a frame that goes into the group of an earlier one. `tiles`: of each image."""
    pooled = pooling.width(num_features) if pooling.spatial > 1 else num_features
    return tuple(
        count * num_features if frame is None else pooled * (frame[0] % pooling.temporal == 0)
        for frame, count in zip(frames, tiles, strict=True)
    )


def pools(frames: Sequence[Frame], tiles: Sequence[int], pooling: Pooling) -> Pools:
    """The groups of a sample's images, tile by tile; empty if nothing is pooled anywhere.

    >>> pools([None, (0, 3), (1, 3), (2, 3)], [1, 1, 1, 1], POOLINGS["2x2x2"])
    ((1, 1), (2, 2), (1, 2))
    """
    if pooling == POOLINGS["none"]:
        return ()
    found: list[tuple[int, int]] = []
    for frame, count in zip(frames, tiles, strict=True):
        if frame is None:
            found += [ALONE] * count
        elif frame[0] % pooling.temporal:
            found[-1] = (found[-1][0] + 1, pooling.spatial)
        else:
            found.append((1, pooling.spatial))
    return tuple(found)
