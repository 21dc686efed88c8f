"""What trackers are asked and told, without their packages; with the real ones: tests/trackers."""

import json

import pytest

from megatron_moellava.config import LoggingConfig
from megatron_moellava.machine import is_installed
from megatron_moellava.training import trackers
from megatron_moellava.training.trackers import IDS, Trackers, _flat
from tests.helpers.runs import problems


class Noted:
    """A tracker that writes down what it gets, and fails at a step that the test names."""

    def __init__(self, options, folder, name, known, record):
        self.id, self.seen, self.fails_at = known or "new", [(name, record)], options.project
        if self.fails_at == "start":
            raise PermissionError("not logged in\nmore")

    def scalars(self, iteration, values):
        if str(iteration) == self.fails_at:
            raise ConnectionError
        self.seen.append((iteration, values))

    def close(self, finished):
        self.seen.append(finished)


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(trackers, "TRACKERS", {"wandb": Noted, "mlflow": Noted})


def start(folder, said, **options) -> Trackers:
    return Trackers(LoggingConfig(trackers=("wandb", "mlflow"), **options), folder, {"run": {}}, said.append)


def test_a_run_that_goes_on_has_the_same_entry(tmp_path, noted):
    said: list[str] = []
    start(tmp_path / "run", said)
    (tmp_path / "run" / IDS).write_text(json.dumps({"wandb": "abc"}))
    second = start(tmp_path / "run", said)
    assert json.loads((tmp_path / "run" / IDS).read_text()) == {"wandb": "abc", "mlflow": "new"}
    second.scalars(3, {"train/loss": 1.5})
    second.close(finished=False)
    assert second.writers["wandb"].seen == [("run", {"run": {}}), (3, {"train/loss": 1.5}), False]
    assert start(tmp_path / "run", said, run_name="other").writers["wandb"].seen[0][0] == "other"
    assert said == []


@pytest.mark.parametrize("when, why", [("start", "not logged in"), ("2", "ConnectionError")])
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(tmp_path, noted, when, why):
    said: list[str] = []
    started = start(tmp_path, said, project=when)
    for iteration in (1, 2, 3):
        started.scalars(iteration, {"train/loss": 0.5})
    started.close(finished=True)
    assert said == [f"cannot write to {kind} ({why}); training goes on without it" for kind in ("wandb", "mlflow")]


def test_ids_that_cannot_be_read_begin_anew(tmp_path, noted):
    (tmp_path / IDS).write_text("{")
    assert start(tmp_path, []).writers["wandb"].id == "new"


def test_settings_are_flat_for_mlflow():
    assert _flat({"a": {"b": 1, "c": {"d": None}}, "e": [1]}) == {"a.b": 1, "a.c.d": None, "e": [1]}


def test_trackers_that_cannot_write_are_refused():
    message = problems(1, logging__trackers=["swanlab"])
    assert "logging.trackers needs a folder, to continue the same curves later" in message
    if not is_installed("swanlab"):
        assert "swanlab is not installed; pip install 'megatron-moellava[trackers]' (or swanlab alone)" in message
    assert "use one of: wandb, mlflow, swanlab" in problems(1, logging__trackers=["comet"])
