"""How the visual tokens of a video's frames are averaged, as data: blocks of neighbours in space and in time."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pooling:
    """One way to pool."""

    spatial: int  # side of the blocks of visual tokens that become one
    temporal: int  # frames that become one

    def width(self, num_features: int) -> int:
        """Visual tokens of a group, of `num_features` of each frame; what a side has beyond whole blocks is left out."""
        return (math.isqrt(num_features) // self.spatial) ** 2


POOLINGS = {  # data.video_pooling
    "none": Pooling(1, 1),
    "2x2": Pooling(2, 1),
    "2x2x2": Pooling(2, 2),
}
