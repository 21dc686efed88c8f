"""Questions about places, as their publishers lay them out."""

import json

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.annotations import FIND, WHERE
from megatron_moellava.evaluation.place_questions import read_coco, read_places, read_referring
from tests.helpers import evaluation_miniatures as miniatures


def test_every_wording_of_an_expression_is_a_question(tmp_path):
    folder = miniatures.referring(tmp_path)
    asked = read_referring(folder / "refcoco_val.json", folder / "train2014")
    assert [question.text for question in asked] == [
        WHERE.format(text) for text in ("left cat", "the cup", "cup on the right")
    ]
    assert [question.fields["boxes"] for question in asked] == [[[0, 0, 20, 15]], *[[[20, 15, 40, 30]]] * 2]
    assert all(question.paths[0].exists() for question in asked) and len({question.key for question in asked}) == 3


def test_mdetrs_file_has_its_expression_in_the_picture(tmp_path):
    images = [{"id": 4, "file_name": "a.jpg", "caption": "left cat", "width": 40, "height": 30}]
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 4, "bbox": [1, 2, 3, 4]}]}))
    (question,) = read_referring(path, tmp_path)
    assert question.fields == {"boxes": [[1, 2, 4, 6]], "image": "a.jpg", "width": 40, "height": 30}


def test_a_picture_is_asked_for_each_category_in_it(tmp_path):
    folder = miniatures.coco_boxes(tmp_path)
    asked = read_coco(folder / "annotations/instances_val2017.json", folder / "val2017")
    assert [question.text for question in asked] == [FIND.format("cat"), FIND.format("cup")]
    assert [len(question.fields["boxes"]) for question in asked] == [2, 1]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_places, {"image": "a.png", "text": "?"}, "lacks the field 'boxes'"),
        (read_places, {"image": "a.png", "text": "?", "boxes": [[1, 2, 3]]}, "line 1: `boxes` holds"),
        (read_places, {"image": "a.png", "text": "?", "boxes": 3}, "line 1: `boxes` must be a list, found int"),
        (read_referring, {"image": "a.png", "text": "?"}, "says of no expression"),
        (read_coco, {"image": "a.png"}, "no file in COCO's layout"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, reader, row, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        reader(path, tmp_path)
