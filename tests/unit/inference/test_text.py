"""Text that streams, beams, and pictures that strangers send."""

import base64
import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.requests import Sampling
from megatron_moellava.inference.sampling import BeamSearch, draw
from megatron_moellava.inference.text import TextStream
from megatron_moellava.serving.openai_api import ApiLimits, parse_chat
from megatron_moellava.serving.pictures import PictureLimits, open_url
from tests.helpers.inference_models import TOKENIZER

LIMITS = PictureLimits(max_bytes=200_000, max_pixels=1_000_000)


class Letters:
    """A tokenizer whose tokens are bytes: the hardest case for streaming."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_half_a_character_is_held_back():
    stream = TextStream(Letters())
    deltas = [stream.add(byte) for byte in "aé€".encode()]
    assert deltas == ["a", "", "é", "", "", "€"]


def test_the_beginning_of_a_stop_string_is_held_back_and_given_when_it_is_none():
    stream = TextStream(Letters(), stop=("###",))
    assert [stream.add(ord(letter)) for letter in "a##b##"] == ["a", "", "", "##b", "", ""]
    assert stream.finish() == "##"
    assert stream.text == "a##b##"


def test_text_after_a_stop_string_is_cut_and_the_answer_ends():
    stream = TextStream(Letters(), stop=("###",))
    said = "".join(stream.add(ord(letter)) for letter in "ab###")
    assert (said, stream.stopped, stream.finish()) == ("ab", True, "")


def test_streamed_pieces_join_to_the_decoded_whole():
    tokenizer = load_tokenizer(TOKENIZER)
    ids, _ = tokenizer.encode_text("the image shows a red circle, and more")
    stream = TextStream(tokenizer)
    assert "".join(stream.add(token) for token in ids) + stream.finish() == tokenizer.decode(ids).lstrip()


def test_top_p_draws_only_from_the_likeliest_tokens_at_their_odds():
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    random = torch.Generator().manual_seed(0)
    drawn = [draw(logits_V, Sampling(temperature=1.0, top_p=0.75), random) for _ in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 2000 - 0.5 / 0.8) < 0.04  # three standard deviations


def test_beam_search_finds_the_likelier_sentence_that_greedy_misses():
    """First token: 0 (0.6) or 1 (0.4); after 0 every token is equally likely, after 1 the end (2) is certain."""
    search = BeamSearch(num_beams=2, length_penalty=1.0)
    stop = frozenset({2})
    search.advance(search.propose(torch.tensor([[0.6, 0.4, 1e-9, 1e-9]]).log(), stop), stop)
    assert search.tokens == [[0], [1]]
    after = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1e-9, 1e-9, 1.0, 1e-9]]).log()
    search.advance(search.propose(after, stop), stop, is_last=True)
    assert search.best() == [1, 2]


# --- pictures ---------------------------------------------------------------------------------------------------------


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 10, 10)).save(buffer, "png")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A picture that claims to be enormous, and would unpack to zeros."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(b"\0" * 1_000_000)
    chunks = b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_a_data_url_becomes_a_picture():
    assert open_url(data_url(png(5, 7)), LIMITS).size == (5, 7)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (data_url(png_header(60_000, 60_000)), "pixels"),
        (data_url(png(2000, 1000)), "pixels"),
        (data_url(b"\0" * 300_000), "bytes"),
        (data_url(b"not a picture"), "cannot be read"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), "cannot be read"),
        (data_url(png(5, 5))[:-9] + "@@@", "base64"),
        ("data:text/plain;base64,aGVsbG8=", "form"),
        ("file:///etc/passwd", "data: URL"),
        ("/etc/passwd", "data: URL"),
        ("http://127.0.0.1/a.png", "not allowed"),
    ],
)
def test_what_is_no_acceptable_picture_is_refused(url, message):
    with pytest.raises(DataError, match=message):
        open_url(url, LIMITS)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "10.0.0.1", "169.254.169.254", "localhost"])
def test_remote_urls_never_lead_inside(host):
    with pytest.raises(DataError, match="not a public one"):
        open_url(f"http://{host}/a.png", PictureLimits(allow_remote=True))


# --- the API's bodies -------------------------------------------------------------------------------------------------


def body(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "hi"}]} | fields


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
        {"n": 2},
        {"stop": ["a"] * 9},
        {"tools": [{}]},
        {"seed": 0.5},
    ],
)
def test_bodies_that_cannot_be_served_are_refused(fields):
    with pytest.raises(DataError):
        parse_chat(body(**fields), ApiLimits(), LIMITS)
