"""Counts, sums by picture, and the bootstrap over them."""

import numpy as np
import pytest

from megatron_moellava.evaluation.metrics import Confusion, Score, mean_percent, sum_by_unit


def test_f1_counts_misses_and_false_alarms():
    confusion = Confusion()
    for predicted, truth in ((True, True), (True, False), (False, True), (False, True), (False, False)):
        confusion.add(predicted=predicted, truth=truth)
    # 1 hit, 1 false alarm, 2 misses: precision 1/2, recall 1/3.
    scores = {"accuracy": 40.0, "precision": 50.0, "recall": 100 / 3, "f1": 40.0, "yes_ratio": 40.0}
    assert confusion.percent() == pytest.approx(scores)


def test_bootstrap_equals_the_binomial_error_and_follows_the_unit():
    right = [1.0] * 60 + [0.0] * 40
    pairs = [(value, 1.0) for value in right]

    def error(units):
        sums_UK = sum_by_unit(units, pairs)
        return Score(metric="", sums_UK=sums_UK, headline=mean_percent, count=100).standard_error(2000)

    independent = error(range(100))
    assert independent == pytest.approx(100.0 * np.sqrt(0.6 * 0.4 / 100), rel=0.06)  # 4.90; noise of 2000 draws: 2 %
    # Ten questions of a picture that stand or fall together carry a tenth of the information: sqrt(10) more error.
    assert error([number // 10 for number in range(100)]) == pytest.approx(independent * np.sqrt(10), rel=0.06)
    assert error([0] * 100) == 0.0
    assert error(range(100)) == independent  # the seed is fixed
