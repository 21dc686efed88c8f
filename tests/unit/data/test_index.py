"""The index of a JSON file: every row once, in a fixed order, with what is wrong with it."""

import itertools
import json
import struct

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.index import index_json
from tests.helpers.data_files import row, write_rows


def lines(index) -> list[dict]:
    return [json.loads(line) for line in index.path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_row_is_there_once_and_one_seek_away(tmp_path, name):
    index = index_json(write_rows(tmp_path, [row(i) for i in range(20)], name), tmp_path / "cache")
    found = lines(index)
    assert index.rows == 20 and sorted(line["row"] for line in found) == list(range(20))
    assert [line["row"] for line in found] != list(range(20)), "a random order"
    assert all(line["record"]["id"] == f"id{line['row']}" for line in found)
    assert [found[place]["row"] for place in index.positions] == list(range(20))
    starts = struct.unpack(f"{21}Q", index.path.with_name("rows.jsonl.idx").read_bytes())
    content = index.path.read_bytes()
    assert [json.loads(content[a:b])["row"] for a, b in itertools.pairwise(starts)] == [line["row"] for line in found]


def test_lengths_count_words_and_are_negative_without_an_image(tmp_path):
    rows = [row(0), row(1, None), {"image": "a.png", "conversations": None}]
    lengths = index_json(write_rows(tmp_path, rows), tmp_path / "cache").lengths
    words = [sum(len(turn["value"].split()) for turn in item["conversations"]) for item in rows[:2]]
    assert lengths.tolist() == [words[0], -words[1], 1]


def test_an_index_is_made_once_and_anew_when_the_file_changes(tmp_path):
    path = write_rows(tmp_path, [row(0)])
    first = index_json(path, tmp_path / "cache")
    before = first.path.stat().st_mtime_ns
    assert index_json(path, tmp_path / "cache").path.stat().st_mtime_ns == before
    write_rows(tmp_path, [row(0), row(1)])
    second = index_json(path, tmp_path / "cache")
    assert second.rows == 2 and second.fingerprint != first.fingerprint


def test_duplicate_ids_are_counted_and_two_are_named(tmp_path):
    rows = [row(0), row(1, id="same"), row(2, id="same"), row(3, id="same")]
    index = index_json(write_rows(tmp_path, rows), tmp_path / "cache")
    assert index.duplicates == 3
    assert index.duplicates_message.startswith("row 2 repeats the id 'same' of row 1, 3 rows in all")


def test_what_is_not_json_stays_as_its_own_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(0)) + "\n{broken\n")
    bad = [line for line in lines(index_json(path, tmp_path / "cache")) if "bad" in line]
    assert len(bad) == 1 and bad[0]["row"] == 1 and bad[0]["bad"][0] == "invalid JSON"


def test_an_empty_and_a_missing_file_are_errors(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        index_json(write_rows(tmp_path, []), tmp_path / "cache")
    with pytest.raises(DataError, match="No such file or directory; give a JSON"):
        index_json(tmp_path / "none.json", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*")), "nothing half made is left"
