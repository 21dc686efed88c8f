"""The lengths of LLaVA's 665k rows, and how full rows of them can be."""

import numpy as np
import pytest

from megatron_moellava.data.length_distribution import packing_bound, sample_lengths
from megatron_moellava.data.statistics import packing


def useful(tokens, seq_length, buffer):
    rows = packing(tokens, seq_length, buffer)
    return sum(int(tokens[row].sum()) for row in rows) / (seq_length * len(rows))


def test_rows_of_2048_cannot_be_98_percent_useful_on_the_665k_law():
    """Too few conversations are short enough for a third image: no order and no algorithm could do it."""
    tokens, _ = sample_lengths(6000, 576, 2048)
    bound = packing_bound(tokens, 2048)
    assert 0.97 * bound < useful(tokens, 2048, 128) < bound < 0.92


def test_the_bound_is_right_where_the_answer_is_known():
    assert packing_bound(np.full(10, 48), 100, grid=1) == pytest.approx(0.96)
    assert packing_bound(np.array([60, 40] * 5), 100, grid=1) == pytest.approx(1.0)
    assert packing_bound(np.array([60, 30] * 5), 100, grid=1) == pytest.approx(0.9)
