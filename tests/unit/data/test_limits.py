"""What a limit of a sample counts: positions, or text as in the original."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.loader import build_encoder
from megatron_moellava.data.original import encode_original
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS, config, conversation, make_set


@pytest.fixture
def data(tmp_path):
    path = make_set(tmp_path, 4)
    return lambda **changes: config(path, tokenizer=str(ASSETS / "tok_bpe"), **changes)


def encoder(template="v1", kind="tok_spm", features=16, **fields):
    return Encoder(
        template=get_template(template), tokenizer=load_tokenizer(ASSETS / kind), num_features=features, **fields
    )


def pictures(*turns, count=1):
    return parse_record({"image": ["a.png"] * count, "conversations": conversation(*turns)}, origin="rows.json row 3")


def as_the_original_cuts(sample, limit, features, template="v1", kind="tok_spm"):
    """The collator's cut of ids and labels to model_max_length, then every image grows (specification 4.2)."""
    ids, labels, _ = encode_original(sample, get_template(template), load_tokenizer(ASSETS / kind), limit)
    tokens, grown = [], []
    for token, label in zip(ids[:limit], labels[:limit], strict=True):
        size = features if token == IMAGE_TOKEN else 1
        tokens, grown = tokens + [token] * size, grown + [label] * size
    return tokens, [*grown[1:], -100]


@pytest.mark.parametrize("label_mode", ["spans", "original"])
@pytest.mark.parametrize("limit", [60, 130, 150, 170, 400])
@pytest.mark.parametrize("place", ["{} <image>\nwhat is it?", "<image>\n{}", "{} <image> and <image>"])
def test_text_is_cut_before_images_grow_as_in_the_original(place, limit, label_mode):
    sample = pictures(place.format("look at this"), "a cat and a dog " * 8, count=place.count("<image>"))
    encode = encoder(max_length=1000, text_length=limit, label_mode=label_mode)
    tokens, labels = as_the_original_cuts(sample, limit, 16)
    if all(label == -100 for label in labels) and label_mode == "spans":
        with pytest.raises(BadSample, match=f"more than the {limit} ids .an image counts as one. or 1000 positions"):
            encode(sample)
        return
    found = encode(sample)
    assert (found.tokens_S.tolist(), found.labels_S.tolist()) == (tokens, labels)
    assert len(found.images) == tokens.count(IMAGE_TOKEN) // 16
    whole = encoder(max_length=1000)(sample)
    assert found.length == whole.length
    assert ("truncated" in found.notes) == (len(found.tokens_S) < len(whole.tokens_S))


def test_the_two_rules_differ_by_what_images_take():
    sample = pictures("<image>\nwhat?", "a cat " * 60)
    by_position = encoder(max_length=200)(sample)
    by_text = encoder(max_length=1000, text_length=200)(sample)
    assert (len(by_position.tokens_S), len(by_text.tokens_S)) == (200, 215)
    row = encoder(max_length=210, text_length=200)(sample)  # a row still ends where it ends
    assert len(row.tokens_S) == 210


@pytest.mark.parametrize("label_mode", ["spans", "original"])
def test_a_text_that_is_cut_is_noted_in_both_label_modes(label_mode):
    sample = parse_record({"conversations": conversation("what?", "a cat " * 60)}, origin="")
    for fields in ({"max_length": 200}, {"max_length": 1000, "text_length": 200}):
        found = encoder(label_mode=label_mode, **fields)(sample)
        assert "truncated" in found.notes and len(found.tokens_S) == 200 < found.length


def test_the_rule_reaches_the_loader(data):
    """`data.length_counts=text`: of 40 ids and 15 more positions per image."""
    tokenizer, tower = load_tokenizer(ASSETS / "tok_bpe"), get_tower("clip-tiny")
    for counts, positions, ids in (("positions", 40, None), ("text", 256, 40)):
        made = build_encoder(data(max_sample_length=40, seq_length=256, length_counts=counts), tokenizer, tower, "phi")
        assert (made.max_length, made.text_length) == (positions, ids)


def test_the_originals_labels_need_one_of_the_originals_templates():
    with pytest.raises(ConfigError, match=r"data\.label_mode=original: the original has no template 'llama_3'"):
        encoder("llama_3", max_length=100, label_mode="original")
