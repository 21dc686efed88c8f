"""An interrupted run that is started again ends bit-equal to one that was not: weights, Adam, generators, data order."""

import json

import pytest


def whole(world: int, rows: str = "") -> dict:
    return {"id": f"dp{world}-whole{rows}", "run": "run_whole", "world": world, "rows": rows}


def resumed(world: int, name: str = "resumed", rows: str = "", **control) -> dict:
    needs = [whole(world, rows)]
    return {
        "id": f"dp{world}-{name}{rows}",
        "rows": rows,
        "run": "run_resumed",
        "source": needs[0]["id"],
        "world": world,
        "needs": needs,
    } | control


def difference(first: dict, second: dict) -> dict:
    needs = [*second["needs"], first, second]
    sources = [first["id"], second["id"]]
    return {"id": " and ".join(sources), "run": "run_differences", "sources": sources, "world": 1, "needs": needs}


pairs = [difference(whole(world), resumed(world)) for world in (1, 2)]
# Videos whose frames are pooled, and pictures at native resolution: rows that are dealt to the ranks by cost.
pairs += [
    difference(whole(world, rows), resumed(world, rows=rows)) for rows in ("-videos", "-native") for world in (1, 2)
]
control = difference(whole(1), resumed(1, "other-generators", other_generators=True))


@pytest.mark.parametrize("job", pairs, ids=[" and ".join(job["sources"]) for job in pairs])
def test_resumed_run_is_bit_identical(job, result, results):
    assert result["different"] == []
    steps = [[json.loads(line) for line in (results / name / "steps.jsonl").open()] for name in job["sources"]]
    uninterrupted = {step["iteration"]: step for step in steps[0]}
    assert [step["iteration"] for step in steps[1]] == [3, 4]
    for step in steps[1]:
        for name in ("loss", "grad_norm", "lr", "load_balancing_loss", "samples", "padding_share"):
            assert step[name] == uninterrupted[step["iteration"]][name], name


@pytest.mark.parametrize("job", [control], ids=["generators"])
def test_lost_generators_would_be_seen(job, result):
    """Dropout is on, so that another state of the generators gives other weights."""
    assert any(name.endswith("linear_fc1.weight") for name in result["different"])
