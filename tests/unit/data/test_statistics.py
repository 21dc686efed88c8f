"""Token lengths of a source, and how well they pack."""

import numpy as np
import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.index import index_json
from megatron_moellava.data.statistics import describe, packing, plot, token_lengths
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import encoder, row, write_rows
from tests.helpers.paths import ASSETS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tok_bpe")


def test_lengths_count_images_and_pass_over_bad_rows(tokenizer, tmp_path):
    rows = [row(0), row(1, None), {"id": "bad"}]
    index = index_json(write_rows(tmp_path, rows), tmp_path / "cache")
    tokens, images, unusable = token_lengths(index, encoder(tokenizer))
    assert sorted(images.tolist()) == [0, 1] and len(tokens) == 2
    assert tokens[images == 1][0] > 16 and sum(unusable.values()) == 1
    assert len(token_lengths(index, encoder(tokenizer), limit=1)[0]) <= 1


def test_a_source_without_a_usable_row_is_an_error(tokenizer, tmp_path):
    index = index_json(write_rows(tmp_path, [{"id": "bad"}]), tmp_path / "cache")
    with pytest.raises(DataError, match=r"no row of .* can be used; the first: rows\.json row 0"):
        token_lengths(index, encoder(tokenizer))


def test_rows_hold_every_sample_once_and_are_not_too_long():
    lengths = np.array([5, 3, 2, 7, 1, 4, 6, 2] * 4)
    rows = packing(lengths, seq_length=8, buffer=8)
    used = [index for row_ in rows for index in row_]
    assert len(set(used)) == len(used)
    assert all(lengths[row_].sum() <= 8 for row_ in rows)


def test_a_description_adds_up():
    tokens, images = np.array([4, 4, 8, 8]), np.array([1, 0, 2, 0])
    found = describe(tokens, images, seq_length=8, buffer=4)
    assert (found["samples"], found["images"], found["text_only_share"]) == (4, 3, 0.5)
    assert (found["tokens_mean"], found["tokens_median"], found["tokens_max"]) == (6.0, 6.0, 8)
    assert found["packed_useful_share"] == 1.0 and found["samples_per_row"] == pytest.approx(4 / 3)
    assert found["padded_useful_share"] == pytest.approx(24 / 32)


def test_a_plot_is_a_picture(tmp_path):
    plot(np.array([4, 9, 20]), np.array([1, 0, 1]), tmp_path / "a.png", "lengths")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
