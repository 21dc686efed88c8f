"""Bodies of OpenAI's API, and what of them cannot be served."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.config import DataConfig, DataError
from megatron_moellava.data.quantities import MODALITY
from megatron_moellava.serving.openai_api import ApiLimits, parse_chat
from tests.helpers.modalities import DEPTH
from tests.helpers.pictures import LIMITS, body, data_url, png
from tests.helpers.videos import video_bytes


def test_parts_system_and_history_become_turns():
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is <image>?"},
                {"type": "image_url", "image_url": {"url": data_url(png(4, 4))}},
            ],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Sure?"},
    ]
    chat = parse_chat(body(messages=messages, temperature=1, stop="x"), ApiLimits(), LIMITS)
    assert [turn.text for turn in chat.request.turns] == ["Be brief.\n<image>\nWhat is < image >?", "red", "Sure?"]
    assert len(chat.request.images) == 1
    assert chat.request.sampling.stop == ("x",)


def test_answers_logprobs_and_schemas_become_sampling():
    def sampling(**fields):
        return parse_chat(body(**fields), ApiLimits(), LIMITS).request.sampling

    assert (sampling().n, sampling().logprobs, sampling().json_schema) == (1, None, "")
    assert sampling(n=3, logprobs=True, top_logprobs=4).n == 3
    assert [sampling(logprobs=True).logprobs, sampling(logprobs=True, top_logprobs=4).logprobs] == [0, 4]
    assert sampling(logprobs=False).logprobs is None and sampling(response_format={"type": "text"}).json_schema == ""
    assert json.loads(sampling(response_format={"type": "json_object"}).json_schema) == {"type": "object"}
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert sampling(response_format=given).json_schema == json.dumps(schema), "properties come in the schema's order"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "assistant", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "x" * 70_000}]},
        {"messages": [7]},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"max_tokens": 10**9},
        {"max_tokens": True},
        {"n": 0},
        {"n": 99},
        {"n": 2, "routing": True},
        {"logprobs": 5},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"stop": ["a"] * 9},
        {"response_format": "json"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "", "schema": {}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": "x" * 40_000}}}},
        {"tools": [{}]},
        {"seed": 0.5},
    ],
)
def test_bodies_that_cannot_be_served_are_refused(fields):
    with pytest.raises(DataError):
        parse_chat(body(**fields), ApiLimits(), LIMITS)


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("frequency_penalty", 0.5, 0),
        ("presence_penalty", -0.5, 0.0),
        ("repetition_penalty", 1.2, 1.0),
        ("top_k", 40, -1),
        ("min_p", 0.1, None),
        ("tool_choice", "required", "auto"),
        ("modalities", ["text", "audio"], ["text"]),
        ("guided_json", {"type": "object"}, {}),
    ],
)
def test_what_would_change_the_answer_is_refused_and_what_would_not_is_taken(name, value, neutral):
    with pytest.raises(DataError, match=f"{name} is not supported.*leave it out"):
        parse_chat(body(**{name: value}), ApiLimits(), LIMITS)
    assert parse_chat(body(**{name: neutral}), ApiLimits(), LIMITS)


def test_places_are_asked_for_by_name():
    assert parse_chat(body(regions=True), ApiLimits(), LIMITS).regions
    assert not parse_chat(body(), ApiLimits(), LIMITS).regions


def parts(*kinds: str) -> list[dict]:
    """Text, pictures and a video in this order."""
    image = {"type": "image_url", "image_url": {"url": data_url(png(4, 4))}}
    video = {"type": "video_url", "video_url": {"url": VIDEO}}
    known = {"image": image, "video": video}
    return [known.get(kind, {"type": "text", "text": kind}) for kind in kinds]


VIDEO = "data:video/mp4;base64," + base64.b64encode(video_bytes(frames=8, rate=2)).decode()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (("what?", "image"), "<image>\nwhat?"),  # one goes first, as in training
        (("image", "image", "what?"), "<image>\n<image>\nwhat?"),
        (("like", "image", "or", "image"), "like\n<image>\nor\n<image>"),  # several stay where they are
        (("image",), "<image>\n"),
        (("what?", "video"), "1.0 s: <image>\n3.0 s: <image>\n\nwhat?"),
        (("this", "video", "or", "image", "?"), "this\n1.0 s: <image>\n3.0 s: <image>\n\nor\n<image>\n?"),
        (("\0<image>",), "< image >"),
    ],
)
def test_pictures_and_videos_stand_where_they_are_meant(content, text):
    data = DataConfig(video_fps=0.5, video_times="seconds")
    messages = [{"role": "user", "content": parts(*content)}]
    request = parse_chat(body(messages=messages), ApiLimits(), LIMITS, data).request
    # 8 frames at 2 per second: one in two seconds, from the middles of its halves.
    assert request.turns[0].text == text
    assert len(request.images) == text.count("<image>")


def test_pictures_of_any_turn_keep_their_order():
    messages = [
        {"role": "user", "content": parts("a", "image")},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": parts("video", "b")},
    ]
    request = parse_chat(body(messages=messages), ApiLimits(), LIMITS, DataConfig(video_frames=2)).request
    assert [turn.text for turn in request.turns] == ["<image>\na", "yes", "<image><image>\nb"]
    assert [image.size for image in request.images] == [(4, 4), (64, 48), (64, 48)]


def test_more_pictures_than_allowed_are_counted_before_any_is_opened():
    content = [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}] * 9
    with pytest.raises(DataError, match="9 images and videos, more than 8"):
        parse_chat(body(messages=[{"role": "user", "content": content}]), ApiLimits(), LIMITS)


def _depth_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 9), 941, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_modality_of_the_checkpoint_is_a_part_of_its_own():
    content = [
        {"type": "text", "text": "Compare"},
        {"type": "depth_url", "depth_url": {"url": data_url(_depth_png())}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": data_url(png(4, 4))}},
    ]
    asked = body(messages=[{"role": "user", "content": content}])
    request = parse_chat(asked, ApiLimits(), LIMITS, DataConfig(modalities=(DEPTH,))).request
    assert request.turns[0].text == "Compare\n<image>\nand\n<image>"
    assert [image.info.get(MODALITY) for image in request.images] == ["depth", None]
    assert request.images[0].getpixel((3, 3)) == (128, 128, 128)
    with pytest.raises(DataError, match="parts must be of type text, image_url or video_url"):
        parse_chat(asked, ApiLimits(), LIMITS)
    content[1]["depth_url"]["url"] = data_url(png(4, 4))
    with pytest.raises(DataError, match="depth: holds pixels of the mode RGB"):
        parse_chat(asked, ApiLimits(), LIMITS, DataConfig(modalities=(DEPTH,)))
