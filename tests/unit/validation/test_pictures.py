"""Settings of pictures that do not belong to the tower."""

import pytest

from megatron_moellava.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_moellava.towers import get_tower, tower_of_run
from megatron_moellava.validation.pictures import least_features, picture_problems


def said(tower: str, **data) -> str:
    run = RunConfig(
        model=ModelConfig(backbone="llama-tiny", tower=tower), training=TrainingConfig(stage=2), data=DataConfig(**data)
    )
    return "\n".join(picture_problems(run, tower_of_run(run)))


@pytest.mark.parametrize(
    "name, value", [("max_image_tokens", 64), ("max_sample_image_tokens", 64), ("enlarge_images", False)]
)
def test_budgets_are_for_native_resolution(name, value):
    assert f"data.{name}={value} is for towers at native resolution" in said("clip-tiny", **{name: value})
    assert said("naflex-tiny", **{name: value}) == ""


def test_tiles_are_for_towers_of_one_size():
    assert said("clip-tiny", image_grid=True) == ""
    assert "data.image_grid=true cuts pictures into tiles" in said("naflex-tiny", image_grid=True)


def test_a_picture_has_no_more_than_its_sample():
    assert "data.max_image_tokens=64 of one picture is more than data.max_sample_image_tokens=32" in said(
        "naflex-tiny", max_image_tokens=64, max_sample_image_tokens=32
    )


def test_a_tower_for_videos_takes_so_many_frames_of_each_and_nothing_else():
    assert said("languagebind-video-tiny", video_frames=4) == ""
    assert said("languagebind-video-large-patch14") == "", "eight frames are the default"
    wrong = {"video_frames": 8, "video_fps": 1.0, "video_pooling": "2x2", "video_times": "seconds", "image_grid": True}
    found = said("languagebind-video-tiny", **wrong).splitlines()
    assert [line.split("=")[0] for line in found] == [f"data.{name}" for name in wrong]
    assert all("languagebind-video-tiny attends across the 4 frames of a video, and " in line for line in found)
    assert found[0].endswith("; set it to 4") and found[1].endswith("; leave it unset")


def test_what_a_picture_has_for_certain():
    assert least_features(get_tower("naflex-tiny")) == 1
    assert least_features(get_tower("clip-tiny")) == get_tower("clip-tiny").num_features and least_features(None) == 0


@pytest.mark.parametrize("tower", ["naflex-tiny", "siglip-so400m-patch14-384-original"])
def test_pooling_needs_squares_of_visual_tokens(tower):
    assert f"data.video_pooling=2x2x2 averages squares of visual tokens, and {tower} has none" in said(
        tower, video_pooling="2x2x2"
    )
    assert said("clip-tiny", video_pooling="2x2x2") == ""
