"""Sources on disk, before they are streamed (test_loader.py has the stream)."""

import json

import pytest

from megatron_moellava.config import DataError, Source
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.sources import open_source, peek_records
from tests.helpers.data_files import config, make_loader, make_set


def test_a_json_file_is_opened_with_its_rows_and_weight(tmp_path):
    opened = open_source(Source(path=str(make_set(tmp_path, 6)), weight=2.0), tmp_path / "cache")
    assert (opened.rows, opened.weight, opened.duplicates) == (6, 2.0, 0)
    assert opened.index is not None and opened.path.endswith("rows.jsonl")
    assert sorted(record["id"] for record in peek_records(opened, 100)) == [f"id{i}" for i in range(6)]
    assert len(list(peek_records(opened, 2))) == 2


def test_shards_are_opened_by_what_energon_says_of_them(tmp_path):
    make_shards(make_set(tmp_path / "set", 6), tmp_path / "set", tmp_path / "shards")
    opened = open_source(Source(path=str(tmp_path / "shards")), None)
    assert opened.rows == 6 and opened.index is None
    assert len(list(peek_records(opened, 3))) == 3
    counts = tmp_path / "shards/.nv-meta/.info.json"
    changed = json.loads(counts.read_text())
    changed["shard_counts"] = dict.fromkeys(changed["shard_counts"], 1)
    counts.write_text(json.dumps(changed))
    assert open_source(Source(path=str(tmp_path / "shards")), None).fingerprint != opened.fingerprint


def test_a_folder_that_is_none_of_energons_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"a folder without Energon's \.nv-meta; make shards with"):
        open_source(Source(path=str(tmp_path)), None)


def test_more_workers_than_rows_are_refused_with_both_numbers(tmp_path):
    path = make_set(tmp_path, 3)
    with pytest.raises(DataError, match=r"holds 3 rows for 4 workers \(2 ranks x data\.num_workers=2\)"):
        make_loader(config(path, num_workers=2), world_size=2)
