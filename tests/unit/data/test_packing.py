"""Packing: nothing lost, nothing too long, rows full, ranks balanced."""

import itertools
import random

import numpy as np
import pytest

from megatron_moellava.data.length_distribution import SOURCES, sample_lengths
from megatron_moellava.data.packing import SORTED, fullest_subset, pack_epoch, select_rows
from megatron_moellava.data.statistics import packing


@pytest.mark.parametrize("seed", range(30))
def test_rows_and_rest_are_all_samples_and_no_row_overflows(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 60))]
    rows, rest = select_rows(lengths, 100)
    assert sorted([*itertools.chain(*rows), *rest]) == list(range(len(lengths)))
    assert rows and all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert any(0 in row for row in rows)  # the oldest sample never waits


@pytest.mark.parametrize("seed", range(30))
def test_the_subset_is_the_best_there_is(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(rng.randint(0, 9))]
    space = rng.randint(0, 120)
    sums = (sum(part) for k in range(len(lengths) + 1) for part in itertools.combinations(lengths, k))
    chosen = fullest_subset(lengths, space)
    assert sum(lengths[i] for i in chosen) == max(total for total in sums if total <= space)
    assert len(set(chosen)) == len(chosen)


def test_no_sample_waits_for_long():
    tokens = np.array([60, *[50] * 4000])  # 60 fits with nothing
    rows = packing(tokens, 100, 32)
    assert any(0 in row for row in rows[:4])
    waited = [position - row[0] / 2 for position, row in enumerate(rows[1:])]
    assert max(map(abs, waited)) < 40
    packed = sorted(itertools.chain(*rows))
    assert packed == list(range(len(packed))) and len(packed) > 3960  # none is passed over


def useful(tokens, seq_length, buffer):
    rows = packing(tokens, seq_length, buffer)
    return sum(int(tokens[row].sum()) for row in rows) / (seq_length * len(rows))


@pytest.mark.parametrize("features, least", [(576, 0.995), (729, 0.98)])
@pytest.mark.parametrize("longest", [2048, 4096])
def test_rows_of_4096_are_98_percent_useful_on_the_665k_law(features, least, longest):
    """`longest`: 2,048 is the original's limit of a sample."""
    tokens, images = sample_lengths(6000, features, longest)
    assert useful(tokens, 4096, 128) >= least
    assert sum(rows for rows, *_ in SOURCES.values()) == 664 and 0.05 < (images == 0).mean() < 0.07


def test_short_samples_fill_short_rows():
    tokens = np.random.default_rng(0).integers(30, 68, 4000)  # the quickstart's conversations
    assert useful(tokens, 512, 64) >= 0.99


def test_ranks_get_rows_of_equal_cost():
    """Busiest rank over the mean of 8, per step; rows in random order would be at 1.4."""
    tokens, _ = sample_lengths(16_000, 576, 4096)
    costs = [float((tokens[row].astype(float) ** 2).sum()) for row in packing(tokens, 4096, 128)]
    table = np.array(costs[: len(costs) // 8 * 8]).reshape(-1, 8)
    assert (table.max(1) / table.mean(1)).mean() < 1.1


def test_rows_are_sorted_by_the_costs_that_are_given():
    """Pictures at native resolution: two samples of a row's length may cost a rank very different work."""
    rng = random.Random(0)
    lengths = [rng.randint(20, 60) for _ in range(800)]
    costs = [rng.uniform(0, 10000) for _ in lengths]
    rows = pack_epoch(range(800), lengths, 100, 64, costs)
    assert sorted(itertools.chain(*rows)) == list(range(800))
    totals = [sum(costs[index] for index in row) for row in rows]
    for start in range(0, len(rows), SORTED):
        assert totals[start : start + SORTED] == sorted(totals[start : start + SORTED])
    assert rows != pack_epoch(range(800), lengths, 100, 64), "without costs by attention"
