"""Files of rows: every container holds the same rows, and what cannot be read is named with what to do."""

import bz2
import gzip
import importlib.util
import json
import lzma

import pytest

from megatron_moellava.config import DataConfig, DataError, Source
from megatron_moellava.data import rows as reader
from megatron_moellava.data.first_rows import first_rows_problem
from megatron_moellava.data.rows import read_rows
from megatron_moellava.data.sample import BadSample, parse_record
from tests.helpers.data_files import row, write_images

ROWS = [row(i, id="é☃") for i in range(6)]
TEXTS = {
    "list": json.dumps(ROWS),
    "list over lines": json.dumps(ROWS, indent=1),
    "lines": "\n".join(json.dumps(record) for record in ROWS),
    "lines and blanks": "\n\n".join(json.dumps(record) for record in ROWS) + "\n \n",
    "lines of Windows": "\r\n".join(json.dumps(record) for record in ROWS) + "\r\n",
    "objects over lines": "\n".join(json.dumps(record, indent=1) for record in ROWS),
    "byte order mark": "\ufeff" + json.dumps(ROWS),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
@pytest.mark.parametrize("layout", TEXTS)
def test_every_container_holds_the_same_rows(tmp_path, layout, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACKED[suffix](TEXTS[layout].encode()))
    assert list(read_rows(path)) == list(enumerate(ROWS))


@pytest.mark.parametrize("layout", TEXTS)
@pytest.mark.parametrize("chunk", [7, 1000])
def test_rows_do_not_depend_on_how_much_is_read_at_a_time(tmp_path, monkeypatch, layout, chunk):
    path = tmp_path / "rows.json"
    path.write_text(TEXTS[layout], encoding="utf-8")
    monkeypatch.setattr(reader, "CHUNK", chunk)
    assert list(read_rows(path)) == list(enumerate(ROWS))


WRONG = {
    "a second list": (b"[{}]\n[{}]", "more follows after the JSON list and its 1 rows"),
    "a row after the list": (b'[{}]{"id": 1}', "more follows after the JSON list"),
    "a comma after the list": (b"[{}],", "more follows after the JSON list"),
    "a list that ends early": (b'[{"id": 1}', "ends early, after row 0"),
    "a broken object over lines": (b'{\n"id": 1\n}\n{\n"id"', "row 1: not valid JSON"),
    "UTF-16": (json.dumps(ROWS).encode("utf-16"), "iconv -f utf-16"),
    "zip": (b"PK\x03\x04....", "a zip archive: unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "zstd -d"),
    "tar": (b"\0" * 257 + b"ustar\0", "energon prepare"),
    "arrow": (b"ARROW1\0\0", "write it as JSON Lines"),
    "cut gzip": (gzip.compress(TEXTS["list"].encode() * 50)[:200], "damaged or cut off"),
    "cut xz": (lzma.compress(TEXTS["list"].encode() * 50)[:100], "damaged or cut off"),
    "zip inside of gzip": (gzip.compress(b"PK\x03\x04...."), "a zip archive"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_says_what_to_do(tmp_path, case):
    content, message = WRONG[case]
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert "rows.json" in str(caught.value) and not isinstance(caught.value, BadSample)


def test_parquet_is_read_or_named(tmp_path):
    path = tmp_path / "rows.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"PAR1....PAR1")
        with pytest.raises(DataError, match=r"is Parquet: `pip install pyarrow`.* write it as JSON Lines"):
            list(read_rows(path))
        return
    import pyarrow
    import pyarrow.parquet

    records = [{"id": "0", "image": {"bytes": b"picture", "path": "a.png"}, "conversations": ROWS[0]["conversations"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    ((number, record),) = read_rows(path)
    assert number == 0 and parse_record(record, origin="x").images[0].name.startswith("data:;base64,")


@pytest.mark.parametrize("text", ['{"id": 1, "image": "a", "image": "b"}', '[{"id": 1, "image": "a", "image": "b"}]'])
def test_a_key_given_twice_is_not_half_a_row(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text.replace('"id": 1', f'"conversations": {json.dumps(ROWS[0]["conversations"])}'))
    ((_, record),) = read_rows(path)
    with pytest.raises(BadSample, match=r"unknown key 'image \(given twice\)'; keep one of the two"):
        parse_record(record, origin="x")


def test_two_rows_on_one_line_are_a_broken_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{json.dumps(ROWS[1])} {json.dumps(ROWS[2])}\n")
    assert [type(record) for _, record in read_rows(path)] == [dict, BadSample]


FIRST = {
    "good": (json.dumps(ROWS), None),
    "no JSON": ("colour,answer\nred,1\n", "not valid JSON"),
    "empty": ("", "holds no rows"),
    "empty list": ("[]", "holds no rows"),
    "another format": (json.dumps([{"question": "a", "answer": "b"}]), "the row's keys are 'question', 'answer'"),
    "cut off": ('[{"id": 1', "not valid JSON"),
}


@pytest.mark.parametrize("case", FIRST)
def test_the_first_rows_of_a_source_tell_whether_it_can_be_read(tmp_path, case):
    text, message = FIRST[case]
    (tmp_path / "rows.json").write_text(text)
    write_images(tmp_path)
    found = first_rows_problem(Source(path=str(tmp_path / "rows.json")), DataConfig())
    assert found is None if message is None else message in found


@pytest.mark.parametrize(
    "name, advice", [("x.parquet", "x.parquet"), ("x.jsonl", "x.jsonl"), ("x.tar", "energon prepare")]
)
def test_a_folder_says_what_to_name_instead(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"")
    assert advice in first_rows_problem(Source(path=str(tmp_path)), DataConfig())
