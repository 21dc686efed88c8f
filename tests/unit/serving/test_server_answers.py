"""Several answers, log-probabilities, JSON schemas and turns, with OpenAI's own client."""

import base64
import io
import json
import math

import jsonschema
import pytest

from tests.helpers.inference_models import picture
from tests.helpers.serving import serving

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    },
    "required": ["colour", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    with serving(engine_options={"prefix_cache": 0.01}) as running:
        yield running


@pytest.fixture
def create(server):
    import openai  # a second of imports that collecting the tests does not need

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return lambda **fields: client.chat.completions.create(**{"model": "tiny", "max_tokens": 9} | fields)


def question(text: str = "What is it?", *numbers: int) -> dict:
    parts = []
    for number in numbers:
        buffer = io.BytesIO()
        picture(number).save(buffer, "png")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def schema(content: dict, **fields) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": content} | fields}


def test_several_answers_come_whole_and_streamed_by_their_indices(create):
    fields = {"messages": [question("Say", 3)], "n": 3, "temperature": 1.5, "seed": 4}
    whole = create(**fields)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.choices[0].message.content == create(**fields | {"n": 1}).choices[0].message.content
    streamed, ends, roles = ["", "", ""], {}, []
    chunks = list(create(**fields, stream=True, stream_options={"include_usage": True}))
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        streamed[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert streamed == texts and roles == [0, 1, 2]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    usage, expected = chunks[-1].usage, whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    one = create(**fields | {"n": 1}).usage
    assert one.prompt_tokens == expected.prompt_tokens, "the prompt of three answers is counted once"
    assert one.completion_tokens < expected.completion_tokens


def test_logprobs_describe_the_text_whole_and_streamed(create):
    fields = {"messages": [question("Say", 3)], "logprobs": True, "top_logprobs": 3}
    choice = create(**fields).choices[0]
    entries = choice.logprobs.content
    said = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace").lstrip()
    assert said == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob), "greedy"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
    chunks = [chunk.choices[0] for chunk in create(**fields, stream=True)]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in entries], abs=1e-5)
    assert create(messages=fields["messages"]).choices[0].logprobs is None
    alone = create(**fields | {"top_logprobs": None}).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in alone] == [[]] * len(entries)


def test_an_answer_is_the_json_that_was_asked_for(create):
    for number in range(4):
        fields = {"messages": [question()], "temperature": 2.0, "seed": number, "max_tokens": 200}
        choice = create(**fields, response_format=schema(SCHEMA, strict=True)).choices[0]
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        free = create(**fields, response_format={"type": "json_object"}).choices[0]
        assert free.message.content.startswith("{")
        assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    cut = create(messages=[question()], response_format=schema(SCHEMA), max_tokens=2).choices[0]
    assert cut.finish_reason == "length"
    chunks = list(create(messages=[question()], response_format=schema({"enum": ["yes", "no"]}), stream=True))
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) in ("yes", "no")
    assert create(messages=[question()], response_format={"type": "text"}).choices[0].message.content


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "xml"}, "text, json_object or json_schema"),
        ({"type": "json_schema"}, "a name and a schema"),
        (schema({"type": "strin"}), "Invalid type"),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "name"),
        (schema({"enum": [f"v{number}" for number in range(9000)]}), "characters"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "cannot be continued"),
    ],
)
def test_a_response_format_that_cannot_be_served_is_refused_with_its_reason(create, response_format, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        create(messages=[question()], response_format=response_format)


def test_the_second_turn_reads_only_what_is_new(server, create):
    first = question("Which one is red?", 11, 12)
    answer = create(messages=[first])
    messages = [first, {"role": "assistant", "content": "both"}, question("And this?", 13)]
    encoded, read = server.engine.forward.images_encoded, server.engine.read_tokens
    second = create(messages=messages)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= answer.usage.prompt_tokens - 1
    assert server.engine.read_tokens - read == second.usage.prompt_tokens - cached
    assert server.engine.forward.images_encoded == encoded + 1
