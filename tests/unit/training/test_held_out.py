"""Held-out scores from hand-made logits; layouts and whole runs are in tests/distributed/test_held_out.py."""

import pytest
import torch

from megatron_moellava.training.held_out import SHORT_ANSWER, Score, answer_sums


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
