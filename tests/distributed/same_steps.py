"""The steps that a run has logged, beside those of the same run in one process."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

# A start that a few steps learn from, steadily enough to be compared.
LEARNING = {"optimizer.lr": 3e-3, "optimizer.adam_eps": 1e-4, "optimizer.lr_warmup_fraction": 0.0}
STEPS = 4


def assert_same_steps(results: Path, job: dict, names: Iterable[str]) -> list[dict]:
    """Every step of the job has these numbers of the job `beside` it, whose steps are returned."""
    found, alone = (_steps(results / name) for name in (job["id"], job["beside"]))
    assert len(found) == len(alone) == STEPS
    for one, other in zip(alone, found, strict=True):
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=5e-4, abs=2e-4), (one["iteration"], name)
        assert other["load_balancing_loss"] == pytest.approx(one["load_balancing_loss"], rel=5e-4)
    return alone


def _steps(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").open()]
