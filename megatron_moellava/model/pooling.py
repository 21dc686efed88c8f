"""Visual tokens of a video's frames, averaged over blocks in space and time (data/pooling.py says which).

Shapes: N images, V visual tokens of each, R rows for the language model, D width.
"""

import math

import torch

from megatron_moellava.data.pooling import ALONE, Pools


def pooled(features: torch.Tensor, pools: Pools) -> torch.Tensor:
    """Rows [R, D] of visual tokens [N, V, D] (or [R, D], at native resolution), group by group.

    Two frames of 4 x 4 tokens as the group (2, 2) -> the 4 means of 2 x 2 x 2 of them.
    """
    if all(pool == ALONE for pool in pools):
        return features.flatten(0, -2)
    parts = features.split([images for images, _ in pools])
    return torch.cat([_mean(part_NVD, side) for part_NVD, (_, side) in zip(parts, pools, strict=True)])


def _mean(frames_NVD: torch.Tensor, side: int) -> torch.Tensor:
    """[V / side ** 2, D]: over the frames and over blocks of side x side; what is beyond whole blocks is left out."""
    mean_VD = frames_NVD.mean(dim=0)
    edge = math.isqrt(len(mean_VD))
    blocks = edge // side
    grid = mean_VD.view(edge, edge, -1)[: blocks * side, : blocks * side]
    return grid.unflatten(0, (blocks, side)).unflatten(2, (blocks, side)).mean(dim=(1, 3)).flatten(0, 1)
