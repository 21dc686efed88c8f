"""What a run says of its pictures, and whether its tower can see them so."""

import math
from collections.abc import Iterator

from megatron_moellava.config import DataConfig, RunConfig
from megatron_moellava.towers import Tower

NATIVE_ONLY = ("max_image_tokens", "max_sample_image_tokens", "enlarge_images")


def picture_problems(run: RunConfig, tower: Tower) -> Iterator[str]:
    """Of the settings of `data` that belong to another kind of tower, and of budgets that contradict each other."""
    data, usual = run.data, DataConfig()
    if tower.takes_videos:
        yield from _video_problems(data, tower)
    if data.video_pooling != "none" and (tower.has_grids or math.isqrt(tower.num_features) ** 2 != tower.num_features):
        found = "its pictures differ in them" if tower.has_grids else f"{tower.num_features} of a picture"
        yield (
            f"data.video_pooling={data.video_pooling} averages squares of visual tokens, and {tower.name} has none: {found}; "
            "leave it unset"
        )
    if not tower.native:
        for name in NATIVE_ONLY:
            if getattr(data, name) != getattr(usual, name):
                yield (
                    f"data.{name}={getattr(data, name)} is for towers at native resolution, and every picture of "
                    f"{tower.name} is {tower.num_features} tokens; leave it unset, or use a tower such as "
                    "siglip2-so400m-patch16-naflex"
                )
        return
    if data.image_grid:
        yield (
            f"data.image_grid=true cuts pictures into tiles of one size, and {tower.name} takes them at native resolution; set "
            "data.image_grid=false, and raise data.max_image_tokens for more detail"
        )
    if data.max_sample_image_tokens and tower.num_features > data.max_sample_image_tokens:
        yield (
            f"data.max_image_tokens={tower.num_features} of one picture is more than "
            f"data.max_sample_image_tokens={data.max_sample_image_tokens} of all pictures of a sample; lower the one or raise "
            "the other"
        )


def _video_problems(data: DataConfig, tower: Tower) -> Iterator[str]:
    """Of a tower whose layers attend across the frames of a video."""
    wanted = {
        "video_frames": (tower.num_frames, "it has learned an embedding for each of so many"),
        "video_fps": (0.0, "all videos have equally many frames"),
        "video_pooling": ("none", "its layers have put the frames together already"),
        "video_times": ("none", "a video goes through it as one"),
        "image_grid": (False, "frames are not cut into tiles"),
    }
    for name, (value, reason) in wanted.items():
        if (found := getattr(data, name)) != value:
            way_out = "leave it unset" if value == getattr(DataConfig(), name) else f"set it to {value}"
            yield (
                f"data.{name}={found}: {tower.name} attends across the {tower.num_frames} frames of a video, and {reason}; "
                f"{way_out}"
            )


def least_features(tower: Tower | None) -> int:
    """Visual tokens that the smallest picture has for certain."""
    if tower is None:
        return 0
    return 1 if tower.native else tower.num_features
