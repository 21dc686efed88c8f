"""From sample numbers to a batch and what happened on the way."""

import pytest

from megatron_moellava.config import Source
from megatron_moellava.data.batch import from_wire
from megatron_moellava.data.pipeline import Pipeline
from megatron_moellava.data.sources import Reader, open_sources
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import TOWER, config, encoder, row, write_images, write_rows
from tests.helpers.paths import ASSETS


@pytest.fixture
def pipeline(tmp_path):
    """Of four rows: two with an image, one without, and one that is bad."""
    write_images(tmp_path)
    path = write_rows(tmp_path, [row(0), row(1, "b.png"), row(2, None), {"id": "bad"}])
    reader = Reader(open_sources([Source(path=str(path))], tmp_path / "cache")[0])
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")

    def make(measured=None, **changes):
        return Pipeline(
            reader,
            encoder(tokenizer),
            TOWER,
            config(path, **{"seq_length": 512} | changes),
            pad_multiple=4,
            measured=measured,
        )

    return make


def test_a_packed_row_has_its_samples_and_their_pixels_in_order(pipeline):
    delivered = pipeline()[[1, 2, 0]]
    batch = from_wire(delivered["batch"])
    assert batch.sample_ids == ["id1", "id2", "id0"] and batch.tokens_BS.shape == (1, 512)
    assert batch.pixel_values_NCHW.shape == (2, 3, TOWER.image_size, TOWER.image_size)
    assert (delivered["events"].seen, delivered["events"].skipped) == (3, [])


def test_padded_rows_are_one_for_each_sample(pipeline):
    batch = from_wire(pipeline(packing=False)[[0, 2]]["batch"])
    assert batch.tokens_BS.shape[0] == 2 and batch.tokens_BS.shape[1] % 4 == 0


def test_a_bad_sample_is_an_event_with_its_number_and_takes_nobody_with_it(pipeline):
    delivered = pipeline()[[3, 0]]
    ((reason, message, number),) = delivered["events"].skipped
    assert reason and "rows.json row 3" in message and number == 3
    assert from_wire(delivered["batch"]).sample_ids == ["id0"] and delivered["events"].seen == 2
    assert pipeline()[[3]]["batch"] is None


def test_a_sample_that_is_longer_than_when_the_run_began_is_not_packed(pipeline):
    lengths = [len(pipeline().encode(number)[0]) for number in range(3)]
    assert pipeline(measured=lengths)[[0, 1]]["events"].skipped == []
    ((reason, message, _),) = pipeline(measured=[lengths[0] + 1])[[0]]["events"].skipped
    assert reason == "changed during the run" and f"{lengths[0]} tokens, but {lengths[0] + 1}" in message


def test_what_was_done_to_a_sample_is_noted_with_advice(tmp_path):
    write_images(tmp_path)
    path = write_rows(tmp_path, [row(7)])
    reader = Reader(open_sources([Source(path=str(path))], tmp_path / "cache")[0])
    tokenizer = load_tokenizer(ASSETS / "tok_bpe")
    whole = Pipeline(reader, encoder(tokenizer), TOWER, config(path), pad_multiple=4).encode(0)[0]
    short = encoder(tokenizer, max_length=len(whole) - 1)
    made = Pipeline(reader, short, TOWER, config(path), pad_multiple=4)
    ((note, message),) = made[[0]]["events"].notes
    assert (
        note == "truncated"
        and f"rows.json row 0: cut at {len(whole) - 1} of {len(whole)}" in message
        and "raise data.max_sample_length" in message
    )
