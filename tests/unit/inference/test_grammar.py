"""JSON answers of a model that knows nothing: whatever it says, a finished answer satisfies its schema."""

import json
import random

import jsonschema
import pytest

from megatron_moellava import parallel
from megatron_moellava.config import DataError, MoEConfig
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.grammar import ANY_OBJECT, REMEMBERED, Grammars
from tests.helpers.inference_models import TOKENIZER, ask, tiny_engine
from tests.helpers.tokenizer_folders import BYTES, LLAMA, byte_folder, llama_folder

NESTED = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {
            "type": "object",
            "properties": {"w": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["w"],
            "additionalProperties": False,
        },
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["colour", "code", "parts"],
    "additionalProperties": False,
}
LONGEST = 120  # tokens
SCHEMAS = {
    "any object": json.loads(ANY_OBJECT),
    "nested": NESTED,
    "enumeration": {"enum": ["ja", "nein", 3, None]},
    "array": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 3},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "alternatives": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 99}, {"const": "none"}]},
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
}


@pytest.fixture(autouse=True)
def _leave_no_groups():
    yield
    parallel.shutdown()


def as_json(number: int, schema: dict, **sampling):
    return ask(number, **{"json_schema": json.dumps(schema), "max_new_tokens": LONGEST} | sampling)


def test_every_finished_answer_satisfies_its_schema():
    engine = tiny_engine(MoEConfig(), max_batch_size=8)
    schemas = list(SCHEMAS.values())
    requests = [as_json(2 * n, schema, n=6, temperature=2.0, seed=n) for n, schema in enumerate(schemas)]
    requests += [as_json(2 * n + 1, schema) for n, schema in enumerate(schemas)]
    finished = dict.fromkeys(SCHEMAS, 0)
    for completion in engine.generate(requests):
        name = list(SCHEMAS)[int(completion.request_id[1:]) // 2]
        if completion.finish_reason == "length":
            assert len(completion.tokens) == LONGEST
            continue
        assert (completion.finish_reason, completion.failure) == ("stop", "")
        jsonschema.validate(json.loads(completion.text), SCHEMAS[name])
        finished[name] += 1
    assert all(count for name, count in finished.items() if name != "any object"), finished


def wander(tokenizer, schema: dict, seed: int) -> str | None:
    """The text of tokens drawn from those allowed; None: unfinished."""
    grammar, source, tokens = Grammars(tokenizer, [tokenizer.eos_id]).start(json.dumps(schema)), random.Random(seed), []
    while not grammar.is_complete and len(tokens) < LONGEST:
        token = source.choice(grammar.allowed(tokenizer.vocab_size).nonzero().flatten().tolist())
        assert not grammar.failure
        if token == tokenizer.eos_id:
            return tokenizer.decode(tokens).lstrip()
        tokens.append(token)
        grammar.advance(token)
    return tokenizer.decode(tokens).lstrip() if grammar.is_complete else None


@pytest.mark.parametrize("name", BYTES["folders"])
def test_byte_level_vocabularies_are_read_as_they_are_decoded(name, tmp_path):
    assert_wanders_well(load_tokenizer(byte_folder(tmp_path, name)))


@pytest.mark.parametrize("vocabulary", ["model", "json"])
def test_llama_vocabularies_are_read_as_they_are_decoded(vocabulary, tmp_path):
    assert_wanders_well(load_tokenizer(llama_folder(tmp_path, next(iter(LLAMA["folders"])), vocabulary)))


def assert_wanders_well(tokenizer) -> None:
    ended = [(schema, wander(tokenizer, schema, seed)) for schema in SCHEMAS.values() for seed in range(4)]
    for schema, text in ended:
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
    assert sum(text is not None for _, text in ended) > len(ended) / 3


def test_a_json_answer_disturbs_no_neighbour_and_keeps_the_models_own_logprobs():
    engine = tiny_engine(MoEConfig(), max_batch_size=3)
    (free,) = engine.generate([ask(0, logprobs=1)])
    done = {item.request_id: item for item in engine.generate([ask(0, logprobs=1), as_json(1, NESTED, logprobs=1)])}
    assert done["r0"].tokens == free.tokens
    assert all(item.logprob < item.top[0][1] for item in done["r1"].logprobs[:2]), "the likeliest token was allowed"


def test_a_truncated_answer_ends_with_its_length_and_a_complete_one_of_that_length_with_stop():
    engine = tiny_engine()
    (whole,) = engine.generate([as_json(0, NESTED, max_new_tokens=200)])
    assert whole.finish_reason == "stop"
    (cut,) = engine.generate([as_json(0, NESTED, max_new_tokens=len(whole.tokens) - 1)])
    assert cut.finish_reason == "length" and whole.text.startswith(cut.text)
    (exact,) = engine.generate([as_json(0, NESTED, max_new_tokens=len(whole.tokens))])
    assert (exact.finish_reason, exact.text) == ("stop", whole.text)


REFUSED = {
    "unknown type": ({"type": "strin"}, "Invalid type"),
    "unsatisfiable": ({"type": "integer", "minimum": 3, "maximum": 1}, "Unsatisfiable"),
    "no such definition": ({"$ref": "#/nope"}, "nope"),
    "somewhere else": ({"$ref": "http://127.0.0.1/x.json"}, "127.0.0.1"),
    "look-ahead": ({"type": "string", "pattern": "^(?=a)b"}, "look-around|regex"),
    "not supported": ({"not": {"type": "integer"}}, "not"),
    "too large": (
        {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {} for i in range(30)}} for j in range(300)]},
        "too big",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_served_is_refused_with_its_reason(name):
    schema, message = REFUSED[name]
    grammars = Grammars(load_tokenizer(TOKENIZER), [2])
    with pytest.raises(DataError, match=message) as error:
        grammars.start(json.dumps(schema))
    assert "\n" not in str(error.value)


def test_a_schema_that_turns_out_to_be_impossible_ends_its_own_answer_only():
    engine = tiny_engine(max_batch_size=3)
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    bomb = {"type": "string", "pattern": "^((a{90,100}){90,100}){90,100}$"}
    requests = [ask(0), as_json(1, endless), as_json(2, bomb, max_new_tokens=40)]
    done = {item.request_id: item for item in engine.generate(requests)}
    (alone,) = engine.generate([ask(0)])
    assert done["r0"].tokens == alone.tokens
    assert done["r1"].finish_reason == "error" and done["r1"].failure
    assert done["r2"].finish_reason == "length" and done["r2"].text.startswith('"aaaa')


def test_a_schema_is_compiled_once_and_answers_do_not_share_their_place_in_it():
    grammars = Grammars(load_tokenizer(TOKENIZER), [2])
    first, second = grammars.start(ANY_OBJECT), grammars.start(ANY_OBJECT)
    assert len(grammars._compiled) == 1
    brace = next(index for index in range(500) if grammars.tokenizer.piece(index) == b"{")
    before = second.allowed(500)
    first.advance(brace)
    assert (second.allowed(500) == before).all() and not (first.allowed(500) == before).all()
    assert not before[2] and before[brace] and not before[grammars.tokenizer.pad_id]
    for number in range(REMEMBERED + 3):
        grammars.start(json.dumps({"const": number}))
    assert len(grammars._compiled) == REMEMBERED


def test_without_the_library_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"megatron-moellava\[json\]"):
        Grammars(load_tokenizer(TOKENIZER), [2]).start(ANY_OBJECT)
