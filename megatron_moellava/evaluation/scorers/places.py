"""Boxes and points: RefCOCO's accuracy at an IoU of 0.5, pointing, and detection without confidences.

Truths are those of a training row (`boxes`, `points`, `box_format`). What an answer names is in its row of the predictions
file, in pixels, where this project's engine wrote that; of other files the text is read, as if the model had seen the
picture padded to a square. Everything is compared in pixels of the upright picture.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moellava.config import DataError
from megatron_moellava.data import geometry, images
from megatron_moellava.data.box_formats import FORMATS
from megatron_moellava.data.regions import View, locate, to_upright
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.metrics import Score, mean_percent, sum_by_unit
from megatron_moellava.evaluation.questions import Question

READ_AS = "thousand"  # the convention of texts without places in pixels
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # COCO's IoUs


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes [[left, top], [right, bottom]].

    >>> [[0, 0], [2, 1]] and [[1, 0], [3, 1]] share 1 of 3: 1/3
    """
    sides = np.minimum(one[1], other[1]) - np.maximum(one[0], other[0])
    shared = float(sides.clip(0).prod())
    total = float((one[1] - one[0]).clip(0).prod() + (other[1] - other[0]).clip(0).prod()) - shared
    return shared / total if total > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One question: what is there, and what the answer names."""

    truths: list[np.ndarray]  # boxes [2, 2]
    boxes: list[np.ndarray]
    points: list[np.ndarray]  # [2]; of a box its middle
    name: str  # category
    image: str


def compared(answered: Answered) -> list[Compared]:
    """The questions in order. DataError where a picture that is needed is not there."""
    metadata = answered.metadata or [{}] * len(answered)
    return [_compare(question, text, given) for (question, text), given in zip(answered, metadata, strict=True)]


def _compare(question: Question, text: str, given: dict) -> Compared:
    view = _view(question)
    form = FORMATS[str(question.fields.get("box_format") or "pixels")]
    truths = [to_upright(box, form, view) for box in question.fields["boxes"]]
    if "regions" in given:
        named = [(str(part["kind"]), np.array(part["points"], dtype=np.float64)) for part in given["regions"]]
    else:
        named = [(part.kind, np.array(part.points)) for part in locate(text, READ_AS, [view])]
    return Compared(
        truths=truths,
        boxes=[points for kind, points in named if kind == "box"],
        points=[points.mean(axis=0) for _, points in named],
        name=str(question.fields.get("category", "")),
        image=str(question.fields.get("image", question.id)),
    )


def _view(question: Question) -> View:
    """Of the picture's header; without the file, of the question's width and height."""
    path, size = question.paths[0], (question.fields.get("width"), question.fields.get("height"))
    if path.exists():
        stored = images.upright(str(path), str(path))
    elif all(isinstance(side, int) and side > 0 for side in size):
        stored = geometry.Map(size=size)  # type: ignore[arg-type]  # checked above
    else:
        raise DataError(
            f"{path} is missing: without it, and without width and height in the question file, no size is known"
        )
    square = geometry.padded(*map(int, stored.size))
    return View(stored=stored, seen=square)


def referring(answered: Answered) -> Score:
    """RefCOCO's accuracy: the first box of the answer overlaps the truth with an IoU of 0.5 or more."""
    pairs = compared(answered)
    overlaps = [
        max((iou(pair.boxes[0], truth) for truth in pair.truths), default=0.0) if pair.boxes else 0.0 for pair in pairs
    ]
    return Score(
        metric="IoU@0.5 (%)",
        sums_UK=sum_by_unit([pair.image for pair in pairs], [(float(value >= 0.5), 1.0) for value in overlaps]),
        headline=mean_percent,
        count=len(pairs),
        details={
            **{
                f"IoU@{threshold:g}": _percent([value >= threshold for value in overlaps])
                for threshold in (0.25, 0.5, 0.75)
            },
            "mean IoU": _percent(overlaps),
            "pointing": _percent([_hits(pair) for pair in pairs]),
            "answers with a box": _percent([bool(pair.boxes) for pair in pairs]),
        },
        notes=_notes(answered),
    )


def pointing(answered: Answered) -> Score:
    """The first point of the answer (of a box its middle) lies in a true box."""
    pairs = compared(answered)
    return Score(
        metric="pointing (%)",
        sums_UK=sum_by_unit([pair.image for pair in pairs], [(float(_hits(pair)), 1.0) for pair in pairs]),
        headline=mean_percent,
        count=len(pairs),
        details={"answers with a place": _percent([bool(pair.points) for pair in pairs])},
        notes=_notes(answered),
    )


def _hits(pair: Compared) -> bool:
    return any(((truth[0] <= point) & (point <= truth[1])).all() for point in pair.points[:1] for truth in pair.truths)


def detection(answered: Answered) -> Score:
    """F1 of the boxes at an IoU of 0.5; in the details COCO's mean average precision with the order in place of confidence.

    A language model gives no confidences: its boxes count as the surer the earlier they are written.
    """
    pairs = compared(answered)
    sums = []
    for pair in pairs:
        hits = sum(matches(pair.boxes, pair.truths, 0.5))
        sums.append((2.0 * hits, float(len(pair.boxes) + len(pair.truths))))
    by_threshold = {threshold: mean_average_precision(pairs, threshold) for threshold in THRESHOLDS}
    return Score(
        metric="F1 at IoU 0.5 (%)",
        sums_UK=sum_by_unit([pair.image for pair in pairs], sums),
        headline=mean_percent,
        count=len(pairs),
        details={
            "AP50, by order": 100.0 * by_threshold[0.5],
            "mAP (0.50 to 0.95), by order": 100.0 * float(np.mean(list(by_threshold.values()))),
            "boxes": sum(len(pair.boxes) for pair in pairs),
            "true boxes": sum(len(pair.truths) for pair in pairs),
        },
        notes=[*_notes(answered), "without confidences: not COCO's mAP"],
    )


def matches(boxes: Sequence[np.ndarray], truths: Sequence[np.ndarray], threshold: float) -> list[bool]:
    """Which boxes hit, each truth taken once, by the first box that overlaps it best."""
    free = list(range(len(truths)))
    found = []
    for box in boxes:
        best = max(free, key=lambda number: iou(box, truths[number]), default=None)
        is_hit = best is not None and iou(box, truths[best]) >= threshold
        if is_hit:
            free.remove(best)  # type: ignore[arg-type]
        found.append(is_hit)
    return found


def mean_average_precision(pairs: Sequence[Compared], threshold: float) -> float:
    """Mean over the categories of the area under precision and recall, boxes ranked by their place in the answer."""
    by_name: dict[str, list[Compared]] = defaultdict(list)
    for pair in pairs:
        by_name[pair.name].append(pair)
    areas = []
    for group in by_name.values():
        ranked = [(rank, hit) for pair in group for rank, hit in enumerate(matches(pair.boxes, pair.truths, threshold))]
        hits = np.array([hit for _, hit in sorted(ranked, key=lambda entry: entry[0])], dtype=np.float64)
        if count := sum(len(pair.truths) for pair in group):
            areas.append(_average_precision(hits, count))
    return float(np.mean(areas)) if areas else 0.0


def _average_precision(hits: np.ndarray, count: int) -> float:
    """The sum of the highest precision at or beyond each hit, over the number of truths."""
    if not len(hits):
        return 0.0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((highest * hits).sum() / count)


def _percent(values: Sequence[float | bool]) -> float:
    return 100.0 * float(np.mean(values)) if len(values) else 0.0


def _notes(answered: Answered) -> list[str]:
    told = sum("regions" in given for given in answered.metadata)
    return (
        [] if told == len(answered) else [f"{len(answered) - told} answers read as {READ_AS!r} over the padded square"]
    )
