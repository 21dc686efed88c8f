"""Answers and chunks in OpenAI's form."""

import json

from megatron_moellava.inference.requests import Completion, Event, TokenLogprobs
from megatron_moellava.serving import openai_answers


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def piece(self, index):
        return bytes([index])


def completion(index: int = 0, text: str = "ab", **fields) -> Completion:
    fields = {"finish_reason": "stop", "num_prompt_tokens": 7, "num_cached_tokens": 5} | fields
    return Completion(request_id="r", text=text, tokens=tuple(text.encode()), index=index, **fields)


def test_answers_stand_in_the_order_of_their_indices_and_share_one_prompt():
    answer = openai_answers.completion_object([completion(1, "cde"), completion(0)], "m", Bytes(), logprobs=False)
    assert [(item["index"], item["message"]["content"], item["logprobs"]) for item in answer["choices"]] == [
        (0, "ab", None),
        (1, "cde", None),
    ]
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    assert openai_answers.usage_chunk([completion()], "m")["usage"]["completion_tokens"] == 2


def test_half_a_character_keeps_its_byte_and_the_impossible_is_a_number():
    item = TokenLogprobs(token=0xC3, logprob=float("-inf"), top=((97, -0.25), (0xA9, -3.0)))
    (entry,) = openai_answers.logprobs_object([item], Bytes())["content"]
    assert (entry["token"], entry["bytes"], entry["logprob"]) == ("\ufffd", [0xC3], -9999.0)
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [("a", -0.25), ("\ufffd", -3.0)]
    json.dumps(entry, allow_nan=False)


def test_chunks_carry_the_index_of_their_answer_and_its_logprobs():
    event = Event(request_id="r", delta="a", index=2, logprobs=(TokenLogprobs(token=97, logprob=-0.5),))
    (choice,) = openai_answers.delta_chunk(event, "m", Bytes())["choices"]
    assert (choice["index"], choice["delta"], choice["finish_reason"]) == (2, {"content": "a"}, None)
    assert choice["logprobs"]["content"][0]["token"] == "a" and choice["logprobs"]["content"][0]["top_logprobs"] == []
    (choice,) = openai_answers.delta_chunk(Event(request_id="r", delta="a"), "m", Bytes())["choices"]
    assert choice["logprobs"] is None
    first, last = (
        openai_answers.first_chunk("r", "m", 1),
        openai_answers.last_chunk(completion(1, routing={"x": 1}), "m"),
    )
    assert first["choices"][0]["index"] == last["choices"][0]["index"] == 1
    assert (last["choices"][0]["finish_reason"], last["routing"]) == ("stop", {"x": 1})


def test_each_answer_carries_its_own_places_where_they_are_asked_for():
    def places(item):
        return [{"kind": "point", "points": [[float(item.index), 2.0]], "image": 0, "start": 0, "end": 2}]

    two = [completion(1), completion(0)]
    whole = openai_answers.completion_object(two, "m", Bytes(), False, places)["choices"]
    assert [choice["regions"][0]["points"] for choice in whole] == [[[0.0, 2.0]], [[1.0, 2.0]]]
    assert openai_answers.last_chunk(two[0], "m", places)["choices"][0]["regions"] == places(two[0])
    for choice in (
        openai_answers.completion_object(two, "m", Bytes(), False)["choices"][0],
        openai_answers.last_chunk(two[0], "m")["choices"][0],
    ):
        assert "regions" not in choice
