"""Pairs of answers as tokens and as packed rows; the loader reads them as any other rows."""

import numpy as np
import pytest
import torch

from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN
from megatron_moellava.data.pair_rows import parse_pair
from megatron_moellava.data.pairs import pair_of
from megatron_moellava.data.sample import BadSample
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers import data_files
from tests.helpers.paths import ASSETS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS / "tok_bpe")


def encoded(tokenizer, record: dict, seq_length: int = 512, **options):
    encode = data_files.encoder(tokenizer, long_samples="skip", **options)
    return pair_of(*map(encode, parse_pair(record, origin="x row 0")), origin="x row 0", seq_length=seq_length)


def trained(tokenizer, sample) -> str:
    return tokenizer.decode([int(token) for token in sample.labels_S if token != IGNORE_INDEX])


def test_labels_are_the_last_answer_alone(tokenizer):
    turns = data_files.conversation("hello", "first answer", "and now?")
    made = encoded(tokenizer, {"prompt": turns, "chosen": "second answer", "rejected": "another"})
    assert trained(tokenizer, made.chosen).strip().startswith("second answer")
    assert trained(tokenizer, made.rejected).strip().startswith("another")
    assert "first" not in trained(tokenizer, made.chosen)


def test_a_pair_is_as_long_as_both_answers_with_their_prompt(tokenizer):
    made = encoded(tokenizer, data_files.pair_row(0))
    assert len(made) == len(made.chosen) + len(made.rejected)
    assert (made.chosen.tokens_S == IMAGE_TOKEN).sum() == (made.rejected.tokens_S == IMAGE_TOKEN).sum() == 16


def test_pairs_that_do_not_fit_are_refused_whole(tokenizer):
    whole = encoded(tokenizer, data_files.pair_row(0))
    for options in ({"seq_length": len(whole) - 1}, {"max_length": len(whole.chosen) - 1}):
        with pytest.raises(BadSample, match="x row 0") as refused:
            encoded(tokenizer, data_files.pair_row(0), **options)
        assert refused.value.reason == "too long"


def loader(tmp_path, count: int = 12, rows=None, **more):
    data_files.write_images(tmp_path)
    path = data_files.write_rows(tmp_path, rows or [data_files.pair_row(number) for number in range(count)])
    return data_files.make_loader(data_files.config(path), micro_batch_size=1, pairs=True, **more)


def test_an_epoch_holds_every_pair_once_and_each_picture_once(tmp_path):
    made = loader(tmp_path)
    batches = data_files.take(made, made.rows_per_epoch())
    assert sorted(number for batch in batches for number in batch.pairs) == list(range(12))
    assert sorted(data_files.ids(batches)) == sorted(f"id{number}" for number in range(12))
    assert sum(batch.counts.samples for batch in batches) == sum(batch.counts.pairs for batch in batches) == 12
    for batch in batches:
        pictures = [[1, 0, 2][number % 3] for number in batch.pairs]
        assert len(batch.pixel_values_NCHW) == sum(pictures)
        expected, first = [], 0
        for count in pictures:
            expected += 2 * list(range(16 * first, 16 * (first + count)))
            first += count
        assert batch.shows_R.tolist() == expected
        assert batch.counts.image_rows == len(expected)
        segments = batch.cu_seqlens.diff().tolist()
        assert len(segments) in (2 * len(batch.pairs), 2 * len(batch.pairs) + 1)


def test_a_batch_brings_the_log_probabilities_of_its_pairs(tmp_path):
    made = loader(tmp_path)
    table_R2 = np.arange(24, dtype=np.float32).reshape(12, 2)
    made.micro_batches.pipeline.reference_R2 = table_R2
    batch = next(made)
    assert torch.equal(batch.reference_P2, torch.from_numpy(table_R2[batch.pairs]))


def test_a_pair_without_a_reference_is_a_bad_row(tmp_path):
    made = loader(tmp_path, count=2)
    made.micro_batches.pipeline.reference_R2 = np.full((2, 2), -np.inf, dtype=np.float32)
    with pytest.raises(Exception, match=r"preference\.log_probs"):
        next(made)


def test_lengths_of_pairs_are_not_those_of_their_files_rows(tmp_path):
    """The same file may have been measured as conversations before."""
    conversations = [data_files.row(number) for number in range(4)]
    path = data_files.write_rows(data_files.write_images(tmp_path), conversations)
    plain = data_files.make_loader(data_files.config(path), micro_batch_size=1)
    pairs = data_files.make_loader(data_files.config(path), micro_batch_size=1, pairs=True)
    assert plain.content != pairs.content
    with pytest.raises(Exception, match="`prompt`, `chosen` and `rejected`"):
        next(pairs)
