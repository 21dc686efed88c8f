"""Questions whose answer is a place: rows with `boxes`, referring expressions, COCO's categories."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron_moellava.config import DataError
from megatron_moellava.data.annotations import (
    FIND,
    WHERE,
    corners,
    expressions,
    is_coco,
    layout_of,
    picture_of,
)
from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.regions import parse_regions
from megatron_moellava.data.rows import stored_rows
from megatron_moellava.evaluation.questions import Picture, Question, field_of, read_jsonl

TEXTS = ("text", "question")
SHAPE = ("width", "height")  # of the picture, for a scorer that does not have it


def read_places(questions: Path, images: Path) -> list[Question]:
    """{"image", "text" or "question", "boxes": [[left, top, right, bottom], ...], "box_format"?, "category"?} a line.

    Raises DataError for a line whose boxes are none.
    """
    asked = []
    for number, row in enumerate(read_jsonl(questions)):
        boxes = field_of(row, "boxes", questions)
        marks = ["<box>" * len(boxes)] if isinstance(boxes, list) else []
        parse_regions({**row, "points": None, "polygons": None}, marks, 1, f"{questions} line {number + 1}")
        text = next((row[name] for name in TEXTS if name in row), None) or field_of(row, "text", questions)
        asked.append(
            Question(
                id=row.get("question_id", number),
                text=str(text),
                picture=Picture(path=images / str(field_of(row, "image", questions))),
                fields=row | {"boxes": boxes},
            )
        )
    return asked


def read_referring(questions: Path, images: Path) -> list[Question]:
    """RefCOCO's expressions in any of the layouts that training reads (data/annotations.py), or MDETR's files.

    Raises DataError for another file.
    """
    asked: list[Question] = []
    for _, record in _records(questions):
        if is_coco(record):
            asked += _captions(record, questions, images)
        elif layout := layout_of(record):
            box = corners(record[layout.box], layout.has_corners)
            for text in expressions(record, layout):
                asked.append(_where(len(asked), text, picture_of(record, layout), [box], record, images))
        else:
            raise DataError(f"{questions}: {json.dumps(record)[:80]} says of no expression where it is")
    return asked


def _captions(coco: dict, questions: Path, images: Path) -> Iterator[Question]:
    found = _by_image(coco)
    for image in coco["images"]:
        boxes = [corners(annotation["bbox"]) for annotation in found[image["id"]]]
        text = str(field_of(image, "caption", questions))
        yield _where(image["id"], text, str(image["file_name"]), boxes, image, images)


def _where(id: int | str, text: str, name: str, boxes: list, record: dict, images: Path) -> Question:
    fields = {"boxes": boxes, "image": name} | {side: record.get(side) for side in SHAPE}
    return Question(id=id, text=WHERE.format(text), picture=Picture(path=images / name), fields=fields)


def read_coco(questions: Path, images: Path) -> list[Question]:
    """COCO's instances: every picture is asked for each category that is in it. DataError for another file."""
    (_, coco), *_ = _records(questions)
    if not is_coco(coco):
        raise DataError(f"{questions} is no file in COCO's layout: it needs `images`, `annotations` and `categories`")
    names = {category["id"]: category["name"] for category in field_of(coco, "categories", questions)}
    found, asked = _by_image(coco), []
    for image in coco["images"]:
        boxes = defaultdict(list)
        for annotation in found[image["id"]]:
            boxes[names[annotation["category_id"]]].append(corners(annotation["bbox"]))
        for name, here in boxes.items():
            fields = {"boxes": here, "image": image["file_name"], "category": name}
            fields |= {side: image.get(side) for side in SHAPE}
            picture = Picture(path=images / image["file_name"])
            asked.append(Question(id=f"{image['id']}-{name}", text=FIND.format(name), picture=picture, fields=fields))
    return asked


def _by_image(coco: dict) -> dict[object, list[dict]]:
    found: dict[object, list[dict]] = defaultdict(list)
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd"):
            found[annotation["image_id"]].append(annotation)
    return found


def _records(path: Path) -> list[tuple[int, dict]]:
    records = list(stored_rows(path))
    if bad := [record for _, record in records if isinstance(record, BadSample)]:
        raise DataError(str(bad[0]))
    if not records:
        raise DataError(f"{path} holds no question")
    return records  # type: ignore[return-value]  # no bad ones


PLACE_READERS = {"places": read_places, "referring": read_referring, "coco": read_coco}
