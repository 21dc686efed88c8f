"""What lmms-eval's tasks show, without lmms-eval."""

import pytest
from PIL import Image

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.evaluation.visuals import shown
from tests.helpers.videos import number_of, write_video

PICTURE = Image.new("L", (4, 4))


def test_pictures_stand_first_or_where_the_text_says():
    assert shown("1", "what?", [PICTURE, [PICTURE]], DataConfig())[0] == "<image>\n<image>\nwhat?"
    text, images = shown("1", "is <image> like <image>?", [PICTURE, PICTURE], DataConfig())
    assert text == "is <image> like <image>?" and [image.mode for image in images] == ["RGB", "RGB"]
    assert shown("1", "what?", [], DataConfig()) == ("what?", ())


def test_a_video_is_its_frames_as_in_training(tmp_path):
    path = str(write_video(tmp_path / "v.mp4"))
    data = DataConfig(video_fps=1.0, video_times="seconds")
    text, images = shown("1", "what happens?", [path], data)
    assert text == "0.5 s: <image>\n1.5 s: <image>\n2.5 s: <image>\n3.5 s: <image>\n\nwhat happens?"
    assert [number_of(image) for image in images] == [5, 15, 25, 35]
    text, images = shown("1", "first <image>, then <video>.", [PICTURE, path], DataConfig(video_frames=2))
    assert text == "first <image>, then <image><image>." and len(images) == 3


def test_anything_else_is_refused():
    with pytest.raises(DataError, match="request 1: a visual is dict; only pictures and videos"):
        shown("1", "what?", [{"array": []}], DataConfig())
