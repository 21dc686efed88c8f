"""Annotations of boxes as conversations: files in COCO's and RefCOCO's layouts become rows with `boxes` as they are read.

  COCO      {"images": [{id, file_name, caption?}], "annotations": [{image_id, category_id, bbox, segmentation}],
            "categories": [{id, name}]}: a conversation for each picture, a turn for each category in it. Pictures with
            a caption are MDETR's: the caption is the expression, the annotations its boxes.
  RefCOCO   an object for each referring expression, or for each thing with several: LAYOUTS names their fields.

COCO's boxes are [left, top, width, height] in pixels of the stored file.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moellava.data.bad_sample import BadSample

# LLaVA-1.5's mix asks so for the box of an expression: a model that was trained with it knows the sentence.
WHERE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
FIND = "Find every {}."
OUTLINE = "Outline the {}."
MOST_CORNERS = 32  # of a polygon that a text may spell


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Which fields of an object hold a picture, what is said of it and where that is."""

    picture: tuple[str, ...]  # the first that is there
    texts: str
    box: str = "bbox"
    has_corners: bool = False  # [left, top, right, bottom] instead of COCO's [left, top, width, height]


LAYOUTS = (
    Layout(picture=("file_name", "image_path"), texts="sentences"),  # RefCOCO's refs with the box of their annotation
    Layout(picture=("img_path",), texts="expression", has_corners=True),  # Shikra's REC files
    Layout(picture=("file_name", "image"), texts="answer"),  # lmms-lab/RefCOCO: `answer` lists the expressions
    Layout(picture=("image", "file_name"), texts="expression"),
)


def layout_of(record: object) -> Layout | None:
    """The layout of an object that says what is where; None for any other row."""
    if not isinstance(record, dict) or "conversations" in record or "messages" in record:
        return None
    for layout in LAYOUTS:
        if layout.box in record and layout.texts in record and any(name in record for name in layout.picture):
            return layout
    return None


def is_coco(record: object) -> bool:
    """Whether an object is a whole file in COCO's layout."""
    return isinstance(record, dict) and all(isinstance(record.get(key), list) for key in ("images", "annotations"))


def rows_of(record: object, origin: str) -> Iterator[object]:
    """The rows of one value of a file; most are a row themselves."""
    if is_coco(record):
        yield from _guarded(coco_rows, record, origin)
    elif layout := layout_of(record):
        yield from _guarded(lambda record, origin: referring_rows(record, layout, origin), record, origin)
    else:
        yield record


def _guarded(read, record, origin: str) -> Iterator[object]:
    try:
        yield from read(record, origin)
    except BadSample as error:
        yield error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        message = f"{origin}: annotations of a layout that is not COCO's or RefCOCO's ({type(error).__name__}: {error})"
        yield BadSample("malformed annotation", f"{message}; docs/reference/data.md lists the fields")


def corners(box: list, has_corners: bool = False) -> list[float]:
    """[left, top, right, bottom]"""
    left, top, right, bottom = map(float, box)
    return [left, top, right, bottom] if has_corners else [left, top, left + right, top + bottom]


def expressions(record: dict, layout: Layout) -> list[str]:
    """What is said of the thing, each way to say it once."""
    given = record[layout.texts]
    given = given if isinstance(given, list) else [given]
    texts = [item.get("raw") or item.get("sent") if isinstance(item, dict) else item for item in given]
    return [str(text) for text in dict.fromkeys(texts) if text]


def picture_of(record: dict, layout: Layout) -> str:
    """The picture's name."""
    return next(record[name] for name in layout.picture if record.get(name))


def referring_rows(record: dict, layout: Layout, origin: str) -> Iterator[dict]:
    """A row for each expression. BadSample for one that is held out: training on it would spoil the benchmark."""
    split = record.get("split", "train")
    if not str(split).startswith("train"):
        raise BadSample(
            "held out", f"{origin}: is of split {split!r}; write those of split 'train' into a file of their own"
        )
    box = corners(record[layout.box], layout.has_corners)
    for number, text in enumerate(expressions(record, layout)):
        name = record.get("sent_id", record.get("ref_id", record.get("question_id", origin)))
        yield _row(f"{name}-{number}", picture_of(record, layout), [(WHERE.format(text), "<box>")], boxes=[box])


def coco_rows(coco: dict, origin: str) -> Iterator[dict]:
    """A row for each picture with boxes; crowds are no boxes of a thing and are left out."""
    names = {category["id"]: category["name"] for category in coco.get("categories", ())}
    found: dict[object, list[dict]] = defaultdict(list)
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd"):
            found[annotation["image_id"]].append(annotation)
    for image in coco["images"]:
        if not (things := found[image["id"]]):
            continue
        if image.get("caption"):
            turns = [(WHERE.format(image["caption"]), " ".join(["<box>"] * len(things)))]
            yield _row(str(image["id"]), image["file_name"], turns, boxes=[corners(thing["bbox"]) for thing in things])
        else:
            yield _detection_row(image, things, names)


def _detection_row(image: dict, things: list[dict], names: dict) -> dict:
    by_name: dict[str, list[dict]] = defaultdict(list)
    for thing in things:
        by_name[names[thing["category_id"]]].append(thing)
    turns, boxes, polygons = [], [], []
    for name, here in by_name.items():
        turns.append((FIND.format(name), " ".join(["<box>"] * len(here))))
        boxes += [corners(thing["bbox"]) for thing in here]
        outline = here[0].get("segmentation")
        if not isinstance(outline, list) or len(here) > 1 or len(outline) != 1:
            continue
        if 6 <= len(outline[0]) <= 2 * MOST_CORNERS:
            turns.append((OUTLINE.format(name), "<polygon>"))
            polygons.append(outline[0])
    return _row(str(image["id"]), image["file_name"], turns, boxes=boxes, polygons=polygons)


def _row(name: str, image: str, turns: list[tuple[str, str]], **places: list) -> dict:
    texts = [text for pair in turns for text in pair]
    texts[0] = f"<image>\n{texts[0]}"
    conversation = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": name, "image": image, "conversations": conversation} | {
        key: value for key, value in places.items() if value
    }
