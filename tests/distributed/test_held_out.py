"""Validation while training: the same numbers under every layout, and no trace in what is trained."""

import json

import pytest

from tests.distributed.test_resume import whole

LAYOUTS = {
    "dp2": {},
    "tp2": {"parallel.tensor_model_parallel_size": 2},
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "vpp2": {"parallel.pipeline_model_parallel_size": 2, "parallel.virtual_pipeline_model_parallel_size": 2},
    "cp2": {"parallel.context_parallel_size": 2},
    "ep2": {"parallel.expert_model_parallel_size": 2},
}
PADDED = {"data.packing": False, "training.micro_batch_size": 2, "training.global_batch_size": 4}
ORIGINAL = PADDED | {"moe.router": "original", "moe.moe_expert_capacity_factor": 1.5}
# Dropout is drawn by each layout in its own way.
STEADY = {"model.backbone": "phi-2-tiny"}


def validated(name: str, world: int, layout: dict, needs: tuple = (), **more) -> dict:
    return {
        "id": f"validated-{name}",
        "run": "run_validated",
        "world": world,
        "settings": layout,
        "needs": list(needs),
    } | more


start = validated("start", 1, STEADY | {"training.train_steps": 2})


def beside(name: str, world: int, settings: dict) -> dict:
    """A layout, with the same run in one process before it."""
    kind = "-padded" if "data.packing" in settings else ""
    rows = {key: settings[key] for key in PADDED if key in settings}
    alone = validated(f"one{kind}", 1, STEADY | rows, [start], load=start["id"])
    return validated(name + kind, world, STEADY | settings, [start, alone], load=start["id"], beside=alone["id"])


def scores(results, name: str) -> list[dict]:
    return [json.loads(line) for line in (results / name / "validation.jsonl").open()]


jobs = [beside(name, 2, layout) for name, layout in LAYOUTS.items()]
jobs += [beside(name, 2, PADDED | LAYOUTS[name]) for name in ("dp2", "tp2", "pp2")]


@pytest.mark.parametrize("job", jobs, ids=[job["id"] for job in jobs])
def test_every_layout_gives_the_numbers_of_one_process(job, results, result):
    assert result["exit"] == 0
    alone, found = scores(results, job["beside"]), scores(results, job["id"])
    assert [(one["iteration"], one["source"], one["tokens"]) for one in found] == [
        (one["iteration"], one["source"], one["tokens"]) for one in alone
    ]
    assert len(found) == 8, "two sources after each of four steps"
    for one, other in zip(alone, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-5)
        assert other["short_answers"] == one["short_answers"]


def compared(world: int, name: str, layout: dict) -> dict:
    first, second = whole(world), validated(name, world, layout)
    sources = [first["id"], second["id"]]
    return {
        "id": " and ".join(sources),
        "run": "run_differences",
        "sources": sources,
        "world": 1,
        "needs": [first, second],
    }


undisturbed = [compared(1, "dropout", {}), compared(2, "dropout-dp2", {})]


@pytest.mark.parametrize("job", undisturbed, ids=["one process", "dp2"])
def test_training_is_bit_identical_without_validation(job, results, result):
    """With dropout, so that a generator that validation moves gives other weights."""
    assert result["different"] == []
    assert {one["short_answers"] for one in scores(results, job["sources"][1]) if one["source"] == "short"} == {3}


noisy = validated("original", 1, STEADY | ORIGINAL)
half = validated("half", 1, {"training.train_steps": 2})
resumed = validated("resumed", 1, {}, [half], goes_on=half["id"])


@pytest.mark.parametrize("job", [noisy], ids=["original router"])
def test_the_original_router_validates(job, results, result):
    assert result["exit"] == 0 and len(scores(results, job["id"])) == 8


@pytest.mark.parametrize("job", [resumed], ids=["resumed"])
def test_a_continued_run_knows_the_best_so_far(job, results, result):
    assert result["exit"] == 0
    best = sorted((results / job["id"] / "best").glob("iter_*"))
    losses = {}
    for one in scores(results, job["id"]):
        losses.setdefault(one["iteration"], []).append(one["loss"])
    means = {iteration: sum(values) / 2 for iteration, values in losses.items()}
    assert [path.name for path in best] == [f"iter_{min(means, key=means.get):07d}"]
    assert json.loads((best[0] / "run.json").read_text())["validation"]["loss"] == pytest.approx(min(means.values()))
