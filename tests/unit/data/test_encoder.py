"""A sample's tokens and labels for one run: label modes, limits, long samples."""

import pytest

from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import encoder, row
from tests.helpers.paths import ASSETS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tok_bpe")


def sample(number: int = 3, image: str | None = "a.png"):
    return parse_record(row(number, image), origin="rows.json row 3", max_images=2)


def test_an_image_is_as_many_tokens_as_the_tower_gives_or_its_tiles_ask_for(tokenizer):
    plain = encoder(tokenizer)(sample())
    assert (plain.tokens_S == IMAGE_TOKEN).sum() == 16 and plain.features == (16,)
    tiled = encoder(tokenizer)(sample(), (48,))
    assert (tiled.tokens_S == IMAGE_TOKEN).sum() == 48 and len(tiled) == len(plain) + 32
    assert (plain.id, plain.notes, plain.length) == ("id3", (), len(plain))


def test_labels_are_the_next_token_and_never_of_an_image(tokenizer):
    encoded = encoder(tokenizer)(sample())
    trained = encoded.labels_S != IGNORE_INDEX
    assert trained.any()
    assert (encoded.labels_S[:-1][trained[:-1]] == encoded.tokens_S[1:][trained[:-1]]).all()
    assert not (encoded.labels_S == IMAGE_TOKEN).any()


def test_a_long_sample_is_cut_with_a_note_or_skipped_with_both_numbers(tokenizer):
    whole = len(encoder(tokenizer)(sample()))
    cut = encoder(tokenizer, max_length=whole - 2)(sample())
    assert (len(cut), cut.length, cut.notes) == (whole - 2, whole, ("truncated",))
    with pytest.raises(
        BadSample, match=f"{whole} tokens with its images, more than the {whole - 2} of a sample; shorten"
    ):
        encoder(tokenizer, max_length=whole - 2, long_samples="skip")(sample())


def test_a_sample_with_nothing_left_to_learn_is_bad(tokenizer):
    with pytest.raises(BadSample, match="nothing to learn before the cut"):
        encoder(tokenizer, max_length=20)(sample())


def test_the_originals_labels_are_made_by_its_own_rules(tokenizer):
    ours, originals = (encoder(tokenizer, label_mode=mode)(sample()) for mode in ("spans", "original"))
    assert ours.tokens_S.tolist() == originals.tokens_S.tolist()
    assert ours.labels_S.tolist() == originals.labels_S.tolist(), "where its algorithm does not fail, they agree"
