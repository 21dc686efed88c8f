"""Reading rows: what is refused, with which message, and that nothing good is lost."""

import json

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data import rows as reader
from megatron_moellava.data.index import index_json
from megatron_moellava.data.pipeline import ADVICE
from megatron_moellava.data.rows import read_rows
from megatron_moellava.data.sample import BadSample, parse_record
from tests.helpers.data_files import conversation, row, write_rows
from tests.helpers.modalities import DEPTH, THERMAL

GOOD = conversation("<image>\nWhy?", "Because.")
BAD = {
    "not a record": (["list"], "must be a JSON object"),
    "no conversation": ({"image": "a.png", "conversations": []}, "non-empty list"),
    "malformed turn": ({"conversations": [{"from": "human"}]}, "turn 0 of `conversations` must be an object"),
    "unknown role": (
        {"conversations": [{"from": "bot", "value": "x"}]},
        "turn 0 of `conversations` is from 'bot'; use 'human' or 'gpt'",
    ),
    "roles do not alternate": (
        {"conversations": [*conversation("a", "b"), {"from": "gpt", "value": "c"}]},
        "must alternate human, gpt",
    ),
    "empty answer": ({"conversations": conversation("a", "")}, "no answer to learn from"),
    "image count": ({"image": ["a.png", "b.png"], "conversations": GOOD}, "1 `<image>` in the conversation but 2"),
    "too many images": (
        {"image": ["a.png"] * 17, "conversations": conversation("<image>" * 17, "x")},
        "more than data.max_images=16",
    ),
    "malformed image field": ({"image": 3, "conversations": GOOD}, "name or a list of names"),
    "image and video": ({"image": "a", "video": "b", "conversations": GOOD}, "both `image` and `video`; keep one"),
    "invalid UTF-8": ({"conversations": conversation("a \udcff", "b")}, "not valid UTF-8"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_names_row_rule_and_fix(reason):
    record, message = BAD[reason]
    with pytest.raises(BadSample, match=message) as caught:
        parse_record(record, origin="train.json row 17")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("train.json row 17")


def test_an_image_row_without_its_image_field_is_text_and_noted():
    sample = parse_record({"conversations": GOOD}, origin="")
    assert not sample.images and sample.notes == ("`<image>` without a picture",)


def test_a_leading_answer_is_dropped():
    sample = parse_record({"conversations": [{"from": "gpt", "value": "hi"}, *conversation("a", "b")]}, origin="")
    assert [turn.text for turn in sample.turns] == ["a", "b"] and sample.notes == ("leading answer dropped",)
    sample = parse_record({"conversations": conversation("a", "", "b", "c")}, origin="")
    assert len(sample.turns) == 4 and sample.notes == ("empty answer among others",)


def test_frames_that_were_taken_before_say_which_video_they_are_of():
    record = {"image": ["a", "b", "c", "d"], "conversations": conversation("<image>" * 4 + "What?", "A cat.")}
    sample = parse_record(record | {"frames": [2, 0, 1]}, origin="")
    assert [(ref.frame, ref.is_still) for ref in sample.images] == [
        ((0, 2), True),
        ((1, 2), True),
        (None, False),
        ((0, 1), True),
    ]
    for wrong in ([2], [2, 3], "4", [-1, 5], [True, 3], [10**12]):
        with pytest.raises(BadSample, match=r"row 1: `frames` is .* for 4 pictures"):
            parse_record(record | {"frames": wrong}, origin="row 1")


def test_video_frames_take_the_place_of_their_placeholder():
    record = {"video": "v.gif", "conversations": conversation("<video>\nWhat?", "A cat.")}
    sample = parse_record(record, origin="", frames=lambda name: ["<image>"] * 4)
    assert sample.turns[0].text == "<image>" * 4 + "\nWhat?"
    assert [ref.frame for ref in sample.images] == [(i, 4) for i in range(4)]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("chunk", [1 << 24, 7])
def test_rows_come_back_as_written(tmp_path, name, chunk, monkeypatch):
    rows = [row(i, id="é☃") for i in range(20)]
    path = write_rows(tmp_path, rows, name)
    monkeypatch.setattr(reader, "CHUNK", chunk)
    assert list(read_rows(path)) == list(enumerate(rows))


def test_a_byte_order_mark_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\n\n  \n" + json.dumps(row(1)).encode())
    assert [number for number, _ in read_rows(path)] == [0, 1]
    path.write_bytes(b"\xef\xbb\xbf [" + json.dumps(row(0)).encode() + b"]")
    assert len(list(read_rows(path))) == 1


def test_a_broken_line_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(row(0)).encode()
    path.write_bytes(good + b"\n{broken\n" + b"[" * 100_000 + b"\n" + good + b"\n")
    rows = [record for _, record in read_rows(path)]
    assert [type(record) for record in rows] == [dict, BadSample, BadSample, dict]
    assert "rows.jsonl row 1: not valid JSON" in str(rows[1])


def test_invalid_bytes_cost_only_their_row(tmp_path):
    path = tmp_path / "rows.json"
    rows = json.dumps([row(0), row(1), row(2)]).encode()
    path.write_bytes(rows.replace(b"answer 1", b"answer \xff"))
    outcomes = []
    for number, record in read_rows(path):
        try:
            parse_record(record, origin=f"row {number}")
            outcomes.append(True)
        except BadSample as error:
            outcomes.append(error.reason)
    assert outcomes == [True, "invalid UTF-8", True]


@pytest.mark.parametrize("damage", [b'[{"id": 1}', b'[{"id": 1} {"id": 2}]', b'[{"id": 1}, ', b"[", b'[{"id": }]'])
def test_a_damaged_list_is_an_error_not_a_shorter_list(tmp_path, damage):
    path = tmp_path / "rows.json"
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"rows.json"):
        list(read_rows(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data.sources.path=.*gone.json"):
        list(read_rows(tmp_path / "gone.json"))


def test_the_index_holds_every_row_once_and_counts_duplicate_ids(tmp_path):
    path = write_rows(tmp_path, [row(i, None, id=f"id{i % 4}") for i in range(6)])
    index = index_json(path, tmp_path / "cache")
    lines = [json.loads(line) for line in index.path.read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(6)) and index.rows == 6
    assert [lines[position]["row"] for position in index.positions] == list(range(6))
    assert index.duplicates == 4 and "row 4 repeats the id 'id0' of row 0, 4 rows in all" in index.duplicates_message
    assert "give each row its own id" in index.duplicates_message
    assert (index.lengths < 0).all()


def test_ids_that_read_alike_are_duplicates(tmp_path):
    index = index_json(write_rows(tmp_path, [row(0, None, id=3), row(1, None, id="3")]), tmp_path / "cache")
    assert index.duplicates == 2


def test_the_index_follows_the_file(tmp_path):
    path = write_rows(tmp_path, [row(0)])
    first = index_json(path, tmp_path / "cache")
    assert index_json(path, tmp_path / "cache") == first
    write_rows(tmp_path, [row(0), row(1)])
    assert index_json(path, tmp_path / "cache").rows == 2


def test_bad_rows_stay_in_the_index_with_their_message(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\nbroken\n')
    index = index_json(path, tmp_path / "cache")
    bad = [json.loads(line) for line in index.path.read_text().splitlines() if '"bad"' in line]
    assert index.rows == 2 and bad[0]["bad"][0] == "invalid JSON"


MODALITIES = (DEPTH, THERMAL)


def test_pictures_of_several_modalities_stand_where_their_placeholders_do():
    record = {"image": "a.png", "depth": ["d.png", "e.png"], "thermal": "t.tif"}
    record["conversations"] = conversation("<depth>\n<image> <thermal>\nNear?", "Yes.", "And <depth>?", "No.")
    sample = parse_record(record, origin="row", modalities=MODALITIES)
    assert [(ref.name, ref.modality) for ref in sample.images] == [
        ("d.png", DEPTH), ("a.png", None), ("t.tif", THERMAL), ("e.png", DEPTH),
    ]  # fmt: skip
    assert [turn.text for turn in sample.turns][::2] == ["<image>\n<image> <image>\nNear?", "And <image>?"]


def test_parts_of_a_message_may_be_of_a_modality():
    parts = [{"type": "depth", "depth": "d.png"}, {"type": "image", "path": "a.png"}, {"type": "text", "text": "Near?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
    sample = parse_record({"messages": messages}, origin="row", modalities=MODALITIES)
    assert [ref.name for ref in sample.images] == ["d.png", "a.png"]
    assert sample.turns[0].text == "<image>\n<image>\nNear?" and sample.images[0].modality == DEPTH


def test_depth_beside_a_video_and_in_a_row_of_shards():
    turns = conversation("<video> <depth>\nNear?", "Yes.")
    sample = parse_record({"video": "v", "depth": "d.png", "conversations": turns}, origin="row", modalities=MODALITIES)
    assert [ref.modality for ref in sample.images] == [None] * 8 + [DEPTH]
    turns = conversation("<image><image> <depth>\nNear?", "Yes.")
    record = {"image": ["0.png", "1.png"], "frames": [2], "depth": ["2.png"], "conversations": turns}
    sample = parse_record(record, origin="row", modalities=MODALITIES)
    assert [ref.frame for ref in sample.images] == [(0, 2), (1, 2), None]


BAD_MODALITIES = {
    "unknown key": (
        {"depth": "d.png", "conversations": GOOD, "image": "a.png"},
        "declare such pictures in data.mod",
        (),
    ),
    "image count": (
        {"depth": "d.png", "conversations": GOOD, "image": "a.png"},
        "0 `<depth>` in the conversation but 1 in `depth`",
        MODALITIES,
    ),
    "image and video": (
        {
            "depth": "d.png",
            "conversations": [{"role": "user", "content": [{"type": "image", "path": "a"}]}, conversation("", "b")[1]],
        },
        "both `depth` and the content of the turns",
        MODALITIES,
    ),
}


@pytest.mark.parametrize("reason", BAD_MODALITIES)
def test_a_modality_that_is_not_where_it_should_be(reason):
    record, message, modalities = BAD_MODALITIES[reason]
    with pytest.raises(BadSample, match=message) as caught:
        parse_record(record, origin="row", modalities=modalities)
    assert caught.value.reason == reason


def test_a_placeholder_is_text_only_where_there_is_no_picture_at_all():
    sample = parse_record({"conversations": conversation("Why <depth>?", "x")}, origin="row", modalities=MODALITIES)
    assert (sample.turns[0].text, sample.notes) == ("Why <depth>?", ("placeholder of a modality without a picture",))
    assert sample.notes[0] in ADVICE
    turns = conversation("<image>\nWhy <depth>?", "x")
    for key, message in (("image", "1 `<depth>` .* but 0 in `depth`"), ("depth", "1 `<image>` .* but 0 in `image`")):
        with pytest.raises(BadSample, match=message):
            parse_record({key: "a", "conversations": turns}, origin="row", modalities=MODALITIES)
