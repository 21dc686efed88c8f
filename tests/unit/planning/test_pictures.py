"""What the planner says of pictures and videos, beside what the loader makes of real files."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.data.loader import build_train_loader
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.planning.pictures import Shown, num_frames, of_pictures, of_video
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS, config, conversation, row, write_rows
from tests.helpers.videos import still

CLIP = str(ASSETS / "openai/clip-tiny")
SIZE = (96, 40)
LOADED = {  # tower, settings
    "one resolution": (CLIP, {}),
    "tiles": (CLIP, {"image_grid": True}),
    "tiles with ends of lines": ("siglip-tiny@newline", {"image_grid": True}),
    "native": ("naflex-tiny", {}),
    "native, small ones stay small": ("naflex-tiny", {"enlarge_images": False}),
    "native, one budget for two": ("naflex-tiny", {"max_sample_image_tokens": 20}),
    "native, shuffled": ("naflex-tiny@pixel_shuffle", {}),
}
VIDEOS = {
    "frames": (CLIP, {"video_frames": 5}),
    "pooled": (CLIP, {"video_frames": 5, "video_pooling": "2x2"}),
    "pooled in time": (CLIP, {"video_frames": 5, "video_pooling": "2x2x2"}),
    "by rate": (CLIP, {"video_frames": 16, "video_fps": 0.5, "video_pooling": "2x2x2"}),
    "native": ("naflex-tiny", {"video_frames": 3}),
    "a tower for videos": ("languagebind-video-tiny", {"video_frames": 4}),
}


def loaded(folder, tower, record: dict, **settings):
    """The counts of a batch that holds this one row."""
    data = config(write_rows(folder, [record]), seq_length=1024, **settings)
    share = {"seed": 1, "rank": 0, "world_size": 1, "micro_batch_size": 1}
    return next(build_train_loader(data, load_tokenizer(ASSETS / "tok_bpe"), tower, **share)).counts, data


def expect(counts, shown: Shown, tower) -> None:
    assert counts.image_rows == shown.tokens
    assert counts.tower_inputs == pytest.approx(shown.images * (tower.num_patches if tower.native else 1))
    assert counts.tower_squares == shown.squares


@pytest.mark.parametrize("kind", LOADED)
def test_pictures_are_planned_as_they_are_loaded(tmp_path, kind):
    name, settings = LOADED[kind]
    tower = get_tower(name)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    turns = conversation("<image>\nand\n<image>\nare?", "two lakes")
    counts, data = loaded(tmp_path, tower, row(0, ["0.png", "1.png"], conversations=turns), **settings)
    expect(counts, of_pictures([SIZE, SIZE], tower, data), tower)


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos_are_planned_as_they_are_loaded(tmp_path, kind):
    """A folder of twelve pictures lasts twelve seconds."""
    name, settings = VIDEOS[kind]
    tower = get_tower(name)
    (tmp_path / "film").mkdir()
    for number in range(12):
        still(number).save(tmp_path / "film" / f"{number}.png")
    turns = conversation("<video>\nwhat?", "stripes")
    counts, data = loaded(tmp_path, tower, {"id": "0", "video": "film", "conversations": turns}, **settings)
    expect(counts, of_video(12.0, tower, data), tower)


def test_samples_add_up():
    one = Shown(tokens=10, images=2, squares=8)
    assert one + one == one.times(2) == Shown(tokens=20, images=4, squares=16)


def test_a_rate_gives_frames_up_to_the_most():
    data = replace(config(), video_fps=2.0, video_frames=30)
    assert [num_frames(seconds, data) for seconds in (0.1, 5.0, 60.0)] == [1, 10, 30]
