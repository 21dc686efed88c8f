"""A request as tokens and pixels, by the code of training."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.sample import Turn
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.prompts import Prompter, expand
from megatron_moellava.inference.requests import Request
from megatron_moellava.towers import get_tower
from tests.helpers.inference_models import TOKENIZER, ask, picture


@pytest.fixture(scope="module")
def prompter():
    return Prompter(
        template=get_template("v1"),
        tokenizer=load_tokenizer(TOKENIZER),
        tower=get_tower("clip-tiny"),
        data=DataConfig(tokenizer=str(TOKENIZER), template="v1"),
    )


def test_an_image_token_becomes_its_visual_tokens():
    assert expand([5, IMAGE_TOKEN, 7], [2]) == [5, IMAGE_TOKEN, IMAGE_TOKEN, 7]
    assert expand([IMAGE_TOKEN, IMAGE_TOKEN], [1, 2]) == [IMAGE_TOKEN] * 3


def test_every_picture_has_its_place_and_its_pixels(prompter):
    prompt = prompter(ask(1, images=2))
    features, size = prompter.tower.num_features, prompter.tower.image_size
    assert prompt.tokens.count(IMAGE_TOKEN) == 2 * features
    assert prompt.pixels_NCHW.shape == (2, 3, size, size) and prompt.tiles == (1, 1)
    assert torch.equal(prompt.pixels_NCHW[0], prompter(ask(1)).pixels_NCHW[0])


def test_a_text_alone_has_no_pixels(prompter):
    prompt = prompter(ask(1, images=0))
    assert len(prompt.pixels_NCHW) == 0 and prompt.tiles == () and IMAGE_TOKEN not in prompt.tokens


@pytest.mark.parametrize(
    ("tower", "settings"), [("clip-tiny", {"video_pooling": "2x2"}), ("languagebind-video-tiny", {"video_frames": 4})]
)
def test_a_text_alone_needs_no_frames(prompter, tower, settings):
    data = replace(prompter.data, **settings)
    prompt = replace(prompter, tower=get_tower(tower), data=data)(ask(1, images=0))
    assert prompt.tiles == prompt.features == () and IMAGE_TOKEN not in prompt.tokens


def test_a_picture_is_squeezed_or_padded_as_the_request_says(prompter):
    wide = picture(1, size=(60, 20))
    turns = (Turn(role="user", text="<image>"),)
    pixels = [
        prompter(Request(id="a", turns=turns, images=(wide,), image_aspect_ratio=ratio)).pixels_NCHW
        for ratio in ("model", "pad", "square")
    ]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[1], pixels[2])


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ((), 0, "the last turn must be the user's"),
        ((Turn(role="user", text="a"), Turn(role="assistant", text="b")), 0, "the last turn must be the user's"),
        ((Turn(role="user", text="a"), Turn(role="user", text="b")), 0, "must alternate"),
        ((Turn(role="user", text="<image> and <image>"),), 1, "2 `<image>` for 1 images"),
        ((Turn(role="user", text="a"),), 1, "0 `<image>` for 1 images"),
    ],
)
def test_turns_and_pictures_that_do_not_belong_together_are_refused(prompter, turns, images, message):
    request = Request(id="r7", turns=turns, images=tuple(picture(i) for i in range(images)))
    with pytest.raises(DataError, match=f"request r7: .*{message}"):
        prompter(request)


def test_the_end_of_text_ends_an_answer(prompter):
    assert prompter.tokenizer.eos_id in prompter.stop_ids
