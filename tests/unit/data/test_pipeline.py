"""From a crude sample to a counted event: the task encoder alone (test_loader.py has it in Energon)."""

import json
from types import SimpleNamespace

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.pipeline import GuardedReader, Pipeline, find, read_record
from megatron_moellava.data.sample import BadSample
from megatron_moellava.data.tokenizer import load_tokenizer
from tests.helpers.data_files import TOWER, config, encoder, make_set, row
from tests.helpers.paths import ASSETS

from megatron.energon import SkipSample


def crude(record, **more) -> dict:
    content = {"record": record, "row": 7, "file": "rows.json"}
    return {
        "__key__": "k",
        "__restore_key__": (),
        "__subflavors__": {"source": 0},
        "__shard__": "s.tar",
        "json": content,
    } | more


def pipeline(tmp_path, **changes) -> Pipeline:
    make_set(tmp_path)
    data = config(**changes)
    return Pipeline(encoder(load_tokenizer(ASSETS / "tok_bpe")), TOWER, data, folders=[str(tmp_path)], pad_multiple=4)


def test_a_line_of_an_index_says_its_file_and_row():
    record, origin, members = read_record(crude(row(1)))
    assert (record["id"], origin, members) == ("id1", "rows.json row 7", {})


def test_files_of_a_tar_are_record_and_image_members():
    sample = {"__key__": "k", "__shard__": "s.tar", "json": json.dumps(row(1)).encode(), "0.jpg": b"x", "txt": b"y"}
    record, origin, members = read_record(sample)
    assert (record["id"], origin, members) == ("id1", "s.tar sample k", {"0.jpg": b"x"})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "k"}, "no .json member"),
        ({"__key__": "k", "json": b"{"}, "not valid JSON"),
        ({"__key__": "k", "json": {"bad": ["invalid JSON", "row 3: broken"]}}, "row 3: broken"),
    ],
)
def test_what_is_no_record_is_a_bad_sample(sample, message):
    with pytest.raises(BadSample, match=message):
        read_record(sample)


def test_samples_are_cooked_counted_and_packed_with_their_pixels(tmp_path):
    made = pipeline(tmp_path)
    cooked = [made.cook(crude(row(number))) for number in (1, 2)]
    assert made.events.seen == 2 and made.events.skipped == []
    encoded = [made.postencode_sample(sample) for sample in cooked]
    rows, rest = made.select_rows(encoded)
    assert sum(map(len, rows)) + len(rest) == 2
    delivered = made.pack_selected_samples(encoded[:1])
    assert delivered["batch"].tokens_BS.shape == (1, made.data.seq_length)
    assert delivered["events"].seen == 2 and made.events.seen == 0, "events travel once"
    assert len(delivered["batch"].pixel_values_NCHW) == 1


def test_a_bad_sample_is_skipped_up_to_the_share_and_ends_the_run_beyond_it(tmp_path):
    made = pipeline(tmp_path, max_skip_share=0.01)  # 2 of the first 200
    for _ in range(2):
        with pytest.raises(SkipSample):
            made.cook(crude(row(1, "none.png") | {"conversations": []}))
    assert [reason for reason, _ in made.events.skipped]
    with pytest.raises(DataError, match=r"3 of 3 samples so far are bad, more than data\.max_skip_share=0\.01 allows"):
        made.cook(crude({"id": "x"}))


def test_by_default_the_first_bad_sample_ends_the_run_with_its_own_message(tmp_path):
    with pytest.raises(DataError, match=r"rows\.json row 7"):
        pipeline(tmp_path).cook(crude({"id": "x"}))


def test_a_damaged_spot_of_a_tar_becomes_a_bad_sample():
    class Broken:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            if index:
                raise ValueError("torn")
            return "whole"

        def __str__(self):
            return "shard_0.tar"

    reader = GuardedReader(Broken())
    assert len(reader) == 2 and reader[0] == "whole"
    with pytest.raises(BadSample, match=r"shard_0\.tar: sample 1 cannot be read \(torn\); write the shard again"):
        read_record({"__key__": "1", "json": reader[1].json if hasattr(reader[1], "json") else reader[1]["json"]})


def test_data_sets_are_found_in_a_stack_of_wrappers():
    inner = SimpleNamespace(dataset=None)
    middle = Exception()
    middle.dataset = inner
    outer = SimpleNamespace(dataset=middle)
    assert list(find(outer, Exception)) == [middle]
    assert list(find(outer, SimpleNamespace)) == [outer, inner]
