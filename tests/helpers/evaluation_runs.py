"""Benchmarks in miniature, run through an engine that answers from a table."""

import json
from functools import partial

from megatron_moellava.evaluation.choice_tasks import CHOICE_TASKS
from megatron_moellava.evaluation.place_tasks import PLACE_TASKS
from megatron_moellava.evaluation.runner import Options, evaluate
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures

QUIET = Options(progress=False, bootstrap_samples=50)


PICTURES = {"mmbench_cn": lambda root: miniatures.mmbench(root, "mmbench_dev_cn_20231003.tsv")} | {
    task.name: partial(miniatures.referring, name=task.name) for task in PLACE_TASKS if task.reader == "referring"
}
PICTURES |= {
    task.name: partial(miniatures.lettered, folder=task.folder, questions=task.questions, images=task.images)
    for task in CHOICE_TASKS
    if task.name != "choices"
}


ALIASES = {
    "scienceqa": "science_qa",
    "pointing": "boxes",
    "quickstart_pope": "quickstart",
    "names_pope": "names_scenes",
}


def write_miniature(name, root):
    """The benchmark's files below `root`, as its publisher lays them out."""
    return PICTURES.get(name, getattr(miniatures, ALIASES.get(name, name), None))(root)


def run(name, root, engine, **more):
    """Evaluate the benchmark of `root` with `engine`; results go to root/out."""
    options = more.pop("options", QUIET)
    return evaluate(get_task(name), root, root / "out", engine, model="ours", options=options, **more)


def predictions_of(root, name):
    """The rows of its predictions.jsonl."""
    return [json.loads(line) for line in (root / "out" / name / "predictions.jsonl").read_text().splitlines()]
