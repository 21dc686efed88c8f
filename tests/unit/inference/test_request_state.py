"""One request while it runs: what ends it, and what it has said then."""

import torch

from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.request_state import RequestState
from megatron_moellava.inference.requests import Request, Sampling
from megatron_moellava.inference.sampling import Choice
from megatron_moellava.inference.text import TextStream

END = 0


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def state(stop: tuple[str, ...] = (), **sampling) -> RequestState:
    return RequestState(
        request=Request(id="r", turns=(), sampling=Sampling(**{"max_new_tokens": 5} | sampling)),
        prompt=Prompt(tokens=[1, 2, 3], pixels_NCHW=torch.zeros(0), tiles=()),
        stop_ids=frozenset({END}),
        stream=TextStream(Letters(), stop),
        random=torch.Generator().manual_seed(0),
    )


def say(running: RequestState, text: str) -> str:
    return "".join(running.accept(Choice(ord(letter)))[0] for letter in text)


def test_the_end_token_ends_an_answer_and_is_no_part_of_its_text():
    running = state()
    assert say(running, "ab") == "ab" and running.finish_reason == ""
    assert running.accept(Choice(END)) == ("", []) and running.finish_reason == "stop"
    completion = running.complete().completion
    assert (completion.text, completion.tokens, completion.num_prompt_tokens) == ("ab", (97, 98, END), 3)
    assert completion.routing is None


def test_an_answer_ends_at_its_length():
    running = state(max_new_tokens=2)
    say(running, "ab")
    assert running.finish_reason == "length" and running.complete().completion.text == "ab"


def test_a_stop_string_ends_an_answer_and_what_was_held_back_comes_with_the_end():
    running = state(stop=("##",))
    assert say(running, "a##") == "a" and running.finish_reason == "stop"
    assert running.complete().completion.text == "a"
    running = state(stop=("##",), max_new_tokens=2)
    assert say(running, "a#") == "a"
    assert running.complete().delta == "#"


def test_the_likeliest_token_is_taken_unless_a_temperature_is_set():
    logits_1V = torch.tensor([[0.0, 0.0, 9.0]])
    assert state().choose(logits_1V, likeliest=1) == Choice(1)  # the engine has looked already
    assert state(temperature=0.5).choose(logits_1V, likeliest=1) == Choice(2)


def test_beams_read_their_own_last_tokens_and_need_a_row_each():
    running = state(num_beams=2)
    assert running.width == 2 and state().width == 1
    logits_KV = torch.full((1, 128), -9.0)
    logits_KV[0, [97, 98]] = torch.tensor([2.0, 1.0])
    running.accept(running.choose(logits_KV, likeliest=97))
    assert running.next_tokens() == [97, 98]
    assert not running.has_images
