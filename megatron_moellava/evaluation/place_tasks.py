"""Benchmarks whose answers are boxes. The original has none; the prompts are those that LLaVA-1.5's mix trains."""

from dataclasses import replace

from megatron_moellava.evaluation.scorers import places
from megatron_moellava.evaluation.task import Task

_SPLITS = {  # of each set of expressions over COCO's train2014
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
_REFER = (
    "expressions and boxes: github.com/lichengunc/refer, written as JSON (docs/how-to/evaluation.md); pictures: COCO"
)


def _referring(name: str, split: str) -> Task:
    return Task(
        name=f"{name}_{split}",
        title=f"{name} {split}",
        folder="refcoco",
        questions=f"{name}_{split}.json",
        reader="referring",
        images="train2014",
        locates=True,
        max_new_tokens=32,
        score=places.referring,
        origin=_REFER,
    )


BOXES = Task(
    name="boxes",
    title="boxes",
    folder=".",
    questions="boxes_test.jsonl",
    reader="places",
    images="images",
    locates=True,
    max_new_tokens=32,
    score=places.referring,
    origin="one's own: {image, text, boxes} a line; examples/boxes/make_data.py makes such files",
)
PLACE_TASKS = (
    *(_referring(name, split) for name, splits in _SPLITS.items() for split in splits),
    Task(
        name="coco_boxes",
        title="COCO boxes",
        folder="coco",
        questions="annotations/instances_val2017.json",
        reader="coco",
        images="val2017",
        locates=True,
        max_new_tokens=512,
        score=places.detection,
        origin="cocodataset.org, 2017 val images and annotations",
    ),
    BOXES,
    replace(BOXES, name="pointing", title="pointing", score=places.pointing),
)
