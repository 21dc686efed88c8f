"""Sample -> ids and labels -> positions; test_templates.py goes through all templates."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, answer_ends, check_template, encode, expand
from megatron_moellava.data.sample import parse_record
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import conversation
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.paths import ASSETS

X = IGNORE_INDEX


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tok_spm")


def test_only_answers_and_their_end_are_trained(tokenizer):
    sample = parse_record({"conversations": conversation("hi", "yes", "and", "no")}, origin="s")
    ids, labels = encode(sample, get_template("v1"), tokenizer)
    trained = [token for token, label in zip(ids, labels, strict=True) if label != X]
    assert all(label in (X, token) for token, label in zip(ids, labels, strict=True))
    assert tokenizer.decode(trained).split() == ["yes", "no"] and trained.count(tokenizer.eos_id) == 2


def test_an_image_is_one_token_where_it_stood_and_never_trained(tokenizer):
    record = {"image": ["a.png", "b.png"], "conversations": conversation("<image>\none <image> two", "yes")}
    ids, labels = encode(parse_record(record, origin="s", max_images=2), get_template("v1"), tokenizer)
    assert ids.count(IMAGE_TOKEN) == 2
    assert all(label == X for token, label in zip(ids, labels, strict=True) if token == IMAGE_TOKEN)


def test_images_grow_and_labels_move_to_the_position_before():
    tokens_S, labels_S, images, length = expand([5, IMAGE_TOKEN, 7, 8], [X, X, 7, 8], ("a",), (3,), 100)
    assert tokens_S.tolist() == [5, IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 7, 8]
    assert labels_S.tolist() == [X, X, X, 7, 8, X]
    assert (images, length) == (("a",), 6)


def test_an_image_that_would_be_cut_goes_with_all_that_follows():
    ids, labels = [5, IMAGE_TOKEN, 7], [X, X, 7]
    assert expand(ids, labels, ("a",), (3,), 4)[0].tolist() == [5, *[IMAGE_TOKEN] * 3]
    tokens_S, _, images, length = expand(ids, labels, ("a",), (3,), 3)
    assert (tokens_S.tolist(), images, length) == ([5], (), 5)
    assert expand(ids, labels, ("a",), (3,), 100, text_length=2)[0].tolist() == [5, *[IMAGE_TOKEN] * 3]
    assert expand([], [], (), (), 4)[0].tolist() == []


def test_a_template_whose_marks_the_tokenizer_lacks_is_refused_with_those_it_has(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.template='chatml' writes <\|im_start\|>.*has all of .*v1"):
        check_template(get_template("chatml"), tokenizer)
    check_template(get_template("chatml"), load_tokenizer(write_tokenizer(tmp_path)))


def test_an_answer_ends_where_training_ended_it(tokenizer, tmp_path):
    assert answer_ends(get_template("v1"), tokenizer) == (frozenset({tokenizer.eos_id}), ())
    ids, texts = answer_ends(get_template("v0"), tokenizer)
    assert ids == {tokenizer.eos_id} and texts == ("###",)
    made = load_tokenizer(write_tokenizer(tmp_path))
    assert made.token_id("<|im_end|>") in answer_ends(get_template("chatml"), made)[0]
