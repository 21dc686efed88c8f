"""Held-out scores from hand-made logits; layouts and whole runs are in tests/distributed/test_held_out.py."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_moellava.config import Source, ValidationConfig
from megatron_moellava.conversion.average import take_average
from megatron_moellava.training.held_out import SHORT_ANSWER, Score, answer_sums
from megatron_moellava.training.run import train
from tests.helpers.data_files import make_set
from tests.unit.training.test_small_runs import run_of


def sums(is_answer: list[list[int]], right: list[list[int]]) -> list[float]:
    marks = torch.tensor(is_answer, dtype=torch.bool)
    return answer_sums(marks.float() * 0.5, torch.tensor(right).float(), marks).tolist()


@pytest.mark.parametrize(
    ("is_answer", "right", "expected"),
    [
        ([[0, 1, 1, 0, 1]], [[0, 1, 1, 0, 0]], [1.5, 3, 1, 2]),
        ([[0, 1, 1, 0, 1]], [[1, 1, 0, 1, 1]], [1.5, 3, 1, 2]),
        ([[0, 0, 1], [1, 0, 0]], [[0, 0, 1], [0, 0, 0]], [1.0, 2, 1, 2]),  # an answer ends with its row
        ([[0, 0, 0]], [[1, 1, 1]], [0.0, 0, 0, 0]),
        ([[1] * SHORT_ANSWER], [[1] * SHORT_ANSWER], [SHORT_ANSWER / 2, SHORT_ANSWER, 1, 1]),
        ([[1] * (SHORT_ANSWER + 1)], [[1] * (SHORT_ANSWER + 1)], [(SHORT_ANSWER + 1) / 2, SHORT_ANSWER + 1, 0, 0]),
    ],
    ids=["one of two", "other positions do not count", "two rows", "no answer", "short", "too long to be short"],
)
def test_answers_are_runs_of_labels(is_answer, right, expected):
    assert sums(is_answer, right) == expected


def test_a_source_without_short_answers_has_no_accuracy():
    assert Score("a", 1.0, 9, 0, 0).numbers() == {"loss": 1.0, "tokens": 9, "short_answers": 0}
    assert Score("a", 1.0, 9, 1, 4).numbers()["accuracy"] == 0.25


def test_validation_scores_the_average_beside_the_weights(tmp_path):
    """The score of the averages is that of the checkpoint which `convert average` makes of them."""
    path = make_set(tmp_path / "data", 8)
    validation = ValidationConfig(
        sources=(Source(path=str(path), image_folder=str(path.parent)),), interval=1, best=False
    )
    options = {"lr_warmup_fraction": 0.0, "lr_decay_style": "constant"}
    run = run_of(path, tmp_path / "run", optimizer=options | {"lr": 1e-2, "ema_decay": 0.5}, train_steps=3)
    assert train(replace(run, validation=replace(validation, ema=True))) == 0
    scored = [json.loads(line) for line in (tmp_path / "run/validation.jsonl").read_text().splitlines()]
    stem = path.stem
    assert [(one["iteration"], one["source"]) for one in scored] == [
        (iteration, source) for iteration in (1, 2, 3) for source in (stem, f"{stem}/ema")
    ]
    assert scored[0]["loss"] == scored[1]["loss"], "after one update the average is the weights"
    assert scored[4]["loss"] != pytest.approx(scored[5]["loss"], rel=1e-3)
    take_average(tmp_path / "run", save=tmp_path / "averaged")
    still = run_of(path, tmp_path / "again", optimizer=options | {"lr": 1e-12}, train_steps=1)
    load = replace(still.checkpoint, load=str(tmp_path / "averaged"))
    assert train(replace(still, checkpoint=load, validation=validation)) == 0
    (again,) = [json.loads(line) for line in (tmp_path / "again/validation.jsonl").read_text().splitlines()]
    assert again["loss"] == pytest.approx(scored[5]["loss"], rel=1e-5)
