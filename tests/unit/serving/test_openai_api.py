"""Bodies of OpenAI's API, and what of them cannot be served."""

import json

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.serving.openai_api import ApiLimits, parse_chat
from tests.helpers.pictures import LIMITS, body, data_url, png


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
