"""Text that streams: nothing is shown that the next token could still change."""

from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.text import TextStream
from tests.helpers.inference_models import TOKENIZER


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


# --- pictures ---------------------------------------------------------------------------------------------------------


# --- the API's bodies -------------------------------------------------------------------------------------------------
