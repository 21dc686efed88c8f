"""Closed questions, answered in one forward pass: every layout says and counts what one process does."""

import json

import pytest

from tests.distributed.layouts import BY_ID


def closed(spread: str, **more) -> dict:
    world = BY_ID[spread].world
    return {"id": f"closed {spread}", "run": "run_closed_questions", "spread": spread, "world": world, **more}


ONE = closed("llama:one")
LAYOUTS = ("dp2", "tp2", "pp2", "pp2-vpp2", "ep2", "cp2")
SPREAD = [closed(f"llama:{name}", needs=[ONE]) for name in LAYOUTS]


@pytest.mark.parametrize("job", SPREAD, ids=LAYOUTS)
def test_every_layout_answers_and_routes_as_one_process(job, result, results):
    alone = json.loads((results / f"{ONE['id']}.json").read_text())
    assert result["said"] == alone["said"]
    assert alone["losses"] == pytest.approx(alone["reference"], rel=1e-5)
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert result["choices"] == alone["choices"]
    assert len(set(result["said"])) > 1
