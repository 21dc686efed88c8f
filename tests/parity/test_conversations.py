"""Token ids and labels against recordings of the original MoE-LLaVA (tests/golden/data/conversations.json)."""

import json

import pytest

from megatron_moellava.data.encode import encode
from megatron_moellava.data.original import encode_original
from megatron_moellava.data.sample import BadSample, Turn, parse_record
from megatron_moellava.data.templates import get_template, prompt
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.paths import GOLDEN

CASES = json.loads((GOLDEN / "data/conversations.json").read_text())
TOKENIZERS = {"phi": "tok_bpe", "plain_bpe": "tok_bpe", "v1": "tok_spm", "plain_spm": "tok_spm"}
# The original masks these samples whole: an empty last answer, and a text that holds the separator.
FAILURES = {"empty_answer", "separator_in_text"}
# Version "plain" keeps one image however many the row has, which shifts the features of the rows after it.
ONE_IMAGE = {"caption_two_images"}


def cases(without=None):
    """All recorded cases; `without`: but for these samples and for those that the original cuts ("phi@max48")."""
    for version, samples in CASES["versions"].items():
        for name in samples:
            left_out = without is not None and (name in without or "@max" in version)
            if not name.startswith("__") and not left_out:
                yield pytest.param(version, name, id=f"{version}-{name}")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: load_tokenizer(GOLDEN / "assets" / name) for name in set(TOKENIZERS.values())}


def setup(version, name, tokenizers):
    base, _, limit = version.partition("@max")
    record = CASES["plain" if base.startswith("plain") else "samples"][name]
    template = get_template("plain" if base.startswith("plain") else base)
    return record, template, tokenizers[TOKENIZERS[base]], int(limit or 2048), CASES["versions"][version][name]


def parse(record, name):
    if name == "empty_answer":  # refused by default; give the algorithm what the original gave it
        filled = {"conversations": [record["conversations"][0], {"from": "gpt", "value": "x"}]}
        sample = parse_record(record | filled, origin=name)
        object.__setattr__(sample, "turns", (sample.turns[0], Turn(role="assistant", text="")))
        return sample
    return parse_record(record, origin=name)


@pytest.mark.parametrize("version, name", cases())
def test_original_mode_equals_the_original(version, name, tokenizers):
    record, template, tokenizer, limit, expected = setup(version, name, tokenizers)
    ids, labels, mismatch = encode_original(parse(record, name), template, tokenizer, limit)
    assert ids == expected["input_ids"]
    assert labels == expected["labels"]
    assert mismatch == expected["warning"]


@pytest.mark.parametrize("version, name", cases(without=FAILURES | ONE_IMAGE))
def test_default_mode_equals_the_original_where_that_does_not_fail(version, name, tokenizers):
    record, template, tokenizer, _, expected = setup(version, name, tokenizers)
    ids, labels = encode(parse_record(record, origin=name), template, tokenizer)
    assert ids == expected["input_ids"]
    assert labels == expected["labels"]


@pytest.mark.parametrize("version", ["phi", "v1"])
def test_separator_in_a_question_costs_no_label(version, tokenizers):
    record, template, tokenizer, _, expected = setup(version, "separator_in_text", tokenizers)
    ids, labels = encode(parse_record(record, origin=""), template, tokenizer)
    assert ids == expected["input_ids"]
    trained = [label for label in labels if label != -100]
    assert tokenizer.decode(trained[:-1]).strip() == "ok"
    assert trained[-1] == tokenizer.token_id(template.sep2)


def test_empty_answer_is_refused_with_its_reason():
    with pytest.raises(BadSample, match="no answer to learn from") as caught:
        parse_record(CASES["samples"]["empty_answer"], origin="rows.json row 3")
    assert caught.value.reason == "empty answer"


def test_caption_keeps_every_image(tokenizers):
    record, template, tokenizer, _, _ = setup("plain_bpe", "caption_two_images", tokenizers)
    ids, labels = encode(parse_record(record, origin=""), template, tokenizer)
    assert ids[:2] == [-200, -200]
    assert labels[:2] == [-100, -100] and -100 not in labels[2:]


@pytest.mark.parametrize("version", sorted(CASES["generation_prompts"]))
def test_generation_prompt(version):
    turns = (Turn(role="user", text="<image>\nWhat is shown?"),)
    assert prompt(get_template(version), turns) == CASES["generation_prompts"][version]
