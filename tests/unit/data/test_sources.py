"""Records by sample number: files and WebDataset shards."""

import pytest

from megatron_moellava.config import DataError, Source
from megatron_moellava.data.sample import BadSample, parse_record
from megatron_moellava.data.shards import make_shards
from megatron_moellava.data.sources import Reader, open_source, open_sources, read_members
from tests.helpers.data_files import make_set, row


def test_a_file_is_opened_with_its_rows_and_weight(tmp_path):
    opened = open_source(Source(path=str(make_set(tmp_path, 6)), weight=2.0), tmp_path / "cache")
    assert (opened.rows, opened.weight, opened.duplicates, opened.folder) == (6, 2.0, 0, str(tmp_path))
    assert (opened.share.rows, opened.share.weight, opened.share.run) == (6, 2.0, 1)


def test_samples_are_numbered_through_all_sources_in_the_files_order(tmp_path):
    sources = [Source(path=str(make_set(tmp_path / name, count))) for name, count in (("one", 3), ("two", 2))]
    reader = Reader(open_sources(sources, tmp_path / "cache")[0])
    assert len(reader) == 5
    record, origin, folder, members = reader.read(4)
    assert (record["id"], origin, folder, members) == ("id1", "rows.json row 1", str(tmp_path / "two"), {})
    assert [reader.read(number)[0]["id"] for number in range(5)] == ["id0", "id1", "id2", "id0", "id1"]


def test_a_source_listed_twice_is_one_with_the_summed_weight(tmp_path):
    source = Source(path=str(make_set(tmp_path, 3)), weight=1.5)
    opened, (note,) = open_sources([source, source], tmp_path / "cache")
    assert [entry.weight for entry in opened] == [3.0]
    assert "is listed twice: one source, whose rows are seen 3 times per epoch" in note


def test_shards_hold_the_records_and_their_pictures(tmp_path):
    make_shards(make_set(tmp_path / "set", 6), tmp_path / "set", tmp_path / "shards")
    opened = open_source(Source(path=str(tmp_path / "shards")), None)
    assert opened.rows == 6 and opened.index is None and opened.share.run > 1
    reader = Reader([opened])
    records = [reader.read(number) for number in range(6)]
    assert sorted(record["id"] for record, *_ in records) == [f"id{number}" for number in range(6)]
    for record, origin, _, members in records:
        parsed = reader.with_members(parse_record(record, origin=origin), members)
        assert all(ref.data for ref in parsed.images) and len(parsed.images) == len(members)


def test_a_folder_that_is_none_of_energons_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"a folder without Energon's \.nv-meta; make shards with"):
        open_source(Source(path=str(tmp_path)), None)


def test_a_bad_row_is_read_as_its_own_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a"}\n{broken\n')
    reader = Reader(open_sources([Source(path=str(path))], tmp_path / "cache")[0])
    assert reader.read(0)[0] == {"id": "a"}
    with pytest.raises(BadSample, match=r"rows\.jsonl row 1: not valid JSON"):
        reader.read(1)


@pytest.mark.parametrize(("names", "members", "order"), [
    (["b.png", "a.png"], ["a.png", "b.png"], ["b.png", "a.png"]),  # by name, whatever the tar's order
    (["images/0.a.png"], ["a.png"], ["a.png"]),  # without folder and key
    (["x.jpg", "y.jpg"], ["0.png", "1.png"], ["0.png", "1.png"]),  # all unknown, and one order
    (["a.png", "a.png"], ["a.png"], ["a.png", "a.png"]),
])  # fmt: skip
def test_pictures_of_a_tar_come_in_the_records_order(names, members, order):
    sample = parse_record(row(0, "x") | {"image": names, "conversations": turns(len(names))}, origin="s", max_images=2)
    found = Reader.with_members(sample, {name: name.encode() for name in members})
    assert [ref.data.decode() for ref in found.images] == order


def test_a_picture_that_is_not_in_the_tar_or_in_no_certain_order_is_bad():
    sample = parse_record(row(0, "a.png") | {"conversations": turns(1)}, origin="s")
    with pytest.raises(BadSample, match=r"'a\.png' is not in the shard"):
        Reader.with_members(sample, {"b.png": b"", "c.png": b""})
    two = parse_record(row(0) | {"image": ["x.png", "y.png"], "conversations": turns(2)}, origin="s", max_images=2)
    with pytest.raises(BadSample, match="not in the order of their numbers; name the members"):
        Reader.with_members(two, {"10.png": b"", "2.png": b""})


def turns(pictures: int) -> list[dict]:
    return [{"from": "human", "value": "<image>" * pictures + " what?"}, {"from": "gpt", "value": "a cat"}]


@pytest.mark.parametrize(("json", "message"), [(None, "no .json member"), (b"{", "not valid JSON")])
def test_files_of_a_tar_that_are_no_record_are_named(json, message):
    sample = {"__key__": "7", "__shard__": "s.tar"} | ({"json": json} if json else {})
    with pytest.raises(BadSample, match=f"s.tar sample 7: {message}"):
        read_members(sample)
