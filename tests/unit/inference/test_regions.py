"""What an answer names, in pixels of what was sent."""

from dataclasses import replace

import pytest
from PIL import Image

from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.data.video import FRAME
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.inference.regions import locate_answer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import TOWER
from tests.helpers.inference_models import TOKENIZER, tiny_run


@pytest.fixture
def prompter():
    data = tiny_run().data
    return Prompter(template=get_template("v1"), tokenizer=load_tokenizer(TOKENIZER), tower=TOWER, data=data)


def test_a_box_of_the_answer_is_one_of_the_picture(prompter):
    images = [Image.new("RGB", (400, 300))]
    (found,) = locate_answer("At [250, 125, 500, 999].", images, prompter)
    assert found.data() == {"kind": "box", "points": [[100.1, 0.1], [200.2, 300.0]], "image": 0, "start": 3, "end": 23}
    cropped = locate_answer("At [0, 0, 999, 999].", images, prompter, image_aspect_ratio="square")
    assert cropped[0].points[0] == pytest.approx((400 * 4 / 37, 0))  # the tower of 28 pixels sees 28 of 37 columns
    assert locate_answer("At [0, 0, 999, 999].", [], prompter) == []


def test_the_checkpoint_says_how_numbers_are_read_and_the_last_picture_is_meant(prompter):
    images = [Image.new("RGB", (10, 10)), Image.new("RGB", (280, 280))]
    llava = replace(prompter, data=replace(prompter.data, box_format="llava"))
    (found,) = locate_answer("[0.5, 0.25]", images, llava)
    assert (found.kind, found.points, found.image) == ("point", ((140, 70),), 1)
    assert locate_answer("[500, 250]", images, llava) == []
    grid = replace(prompter, data=replace(prompter.data, image_grid=True, box_format="qwen"))
    assert locate_answer("[14, 7]", images, grid)[0].points == ((140, 70),)


@pytest.mark.parametrize(
    ("tower", "grid"),
    [("clip-tiny", False), ("clip-tiny", True), ("siglip-tiny@newline", True), ("naflex-tiny", False)],
)
def test_a_frame_of_a_video_is_a_padded_square_whatever_becomes_of_pictures(prompter, tower, grid):
    frame = Image.new("RGB", (400, 300))
    frame.info[FRAME] = (0, 1)
    changed = replace(prompter, tower=get_tower(tower), data=replace(prompter.data, image_grid=grid))
    (found,) = locate_answer("[250, 125, 500, 999]", [frame], changed)
    assert found.data()["points"] == [[100.1, 0.1], [200.2, 300.0]]
