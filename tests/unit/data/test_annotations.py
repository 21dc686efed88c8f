"""COCO's and RefCOCO's files as conversations with boxes."""

import json

import pytest

from megatron_moellava.data.annotations import FIND, OUTLINE, WHERE, rows_of
from megatron_moellava.data.rows import read_rows
from megatron_moellava.data.sample import BadSample, parse_record
from tests.helpers.data_files import config, make_loader, take, write_images

COCO = {
    "info": {"year": 2017},
    "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}, {"id": 8, "file_name": "b.png"}],
    "annotations": [
        {
            "image_id": 7,
            "category_id": 1,
            "bbox": [2, 3, 10, 20],
            "iscrowd": 0,
            "segmentation": {"counts": [], "size": []},
        },
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 5.5, 5], "segmentation": [[0, 0, 5.5, 0, 5.5, 5]]},
        {"image_id": 7, "category_id": 1, "bbox": [20, 3, 10, 20], "segmentation": []},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "iscrowd": 1, "segmentation": {}},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cup"}],
}


def turns(row: dict) -> list[str]:
    return [turn["value"] for turn in row["conversations"]]


def test_coco_becomes_a_turn_for_each_category_of_a_picture():
    (row,) = rows_of(COCO, "coco.json row 0")
    assert turns(row) == [
        f"<image>\n{FIND.format('cat')}",
        "<box> <box>",
        FIND.format("cup"),
        "<box>",
        OUTLINE.format("cup"),
        "<polygon>",
    ]
    assert row["boxes"] == [[2, 3, 12, 23], [20, 3, 30, 23], [0, 0, 5.5, 5]] and row["polygons"] == [
        [0, 0, 5.5, 0, 5.5, 5]
    ]
    assert len(parse_record(row, origin="row 0").regions) == 4


def test_a_caption_is_the_expression_of_its_boxes():
    images = [{"id": 1, "file_name": "a.png", "caption": "the left cat"}]
    annotations = [{"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 1}]
    (row,) = rows_of({"images": images, "annotations": annotations}, "row 0")
    assert turns(row) == [f"<image>\n{WHERE.format('the left cat')}", "<box>"] and row["boxes"] == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    "record",
    [
        {
            "file_name": "a.png",
            "bbox": [1, 2, 3, 4],
            "sentences": [{"raw": "left cat"}, {"sent": "the cat"}],
            "split": "train",
        },
        {"img_path": "a.png", "bbox": [1, 2, 4, 6], "expression": "left cat", "height": 30, "width": 40},
        {
            "question_id": "3",
            "file_name": "a.png",
            "bbox": [1, 2, 3, 4],
            "answer": ["left cat", "left cat"],
            "iscrowd": 0,
        },
        {"image": "a.png", "bbox": [1, 2, 3, 4], "expression": "left cat"},
    ],
)
def test_every_layout_of_expressions_gives_the_same_box(record):
    first, *more = rows_of(record, "row 0")
    assert turns(first) == [f"<image>\n{WHERE.format('left cat')}", "<box>"]
    assert first["boxes"] == [[1, 2, 4, 6]] and first["image"] == "a.png"
    assert len(more) == (1 if "sentences" in record else 0)
    assert all(len(parse_record(row, origin="row 0").regions) == 1 for row in (first, *more))


def test_a_held_out_expression_and_a_broken_annotation_are_bad_rows():
    held_out = {"file_name": "a.png", "bbox": [1, 2, 3, 4], "sentences": ["x"], "split": "testA"}
    broken = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "bbox": [1], "category_id": 1}],
    }
    for record, message in ((held_out, "is of split 'testA'"), (broken, "not COCO's or RefCOCO's")):
        (found,) = rows_of(record, "x.json row 0")
        assert isinstance(found, BadSample) and message in str(found)


def test_other_rows_stay_what_they_are():
    for record in (
        {"conversations": [], "bbox": [1, 2, 3, 4], "image": "a", "answer": "b"},
        {"images": ["a"]},
        3,
        None,
    ):
        assert list(rows_of(record, "row 0")) == [record]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_coco_file_is_trained_on_as_it_is(tmp_path, indent):
    write_images(tmp_path)
    path = tmp_path / "instances.json"
    coco = COCO | {"annotations": [*COCO["annotations"], {"image_id": 8, "category_id": 2, "bbox": [0, 0, 40, 31]}]}
    path.write_text(json.dumps(coco, indent=indent))
    assert [number for number, _ in read_rows(path)] == [0, 1]
    loader = make_loader(config(path, seq_length=384))
    (batch,) = take(loader, 1)
    decode = loader.micro_batches.pipeline.encoder.tokenizer.decode
    learned = decode([int(token) for token in batch.labels_BS.flatten() if token >= 0])
    assert "[0, 100, 999, 874]" in learned  # b.png is 40 x 31, 4 pixels below the edge of its square
    assert "[50, 200, 300, 699] [500, 200, 749, 699]" in learned and "[0, 125, 137, 125, 137, 250]" in learned
