"""Micro-batches of a step, dealt to the ranks by what they cost."""

import random

import numpy as np
import pytest

from megatron_moellava.data.dealing import deal


def test_the_longest_of_a_round_goes_to_the_rank_that_has_least():
    assert deal([1, 9, 4, 6], 2) == [[0, 1], [2, 3]]
    assert deal([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]


def test_one_rank_computes_all_as_they_come():
    assert deal([3, 1, 2], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("world_size, rounds", [(2, 1), (2, 7), (8, 4), (5, 3)])
def test_every_micro_batch_is_dealt_once_and_equally_many_to_each_rank(world_size, rounds):
    draw = random.Random(world_size)
    costs = [draw.uniform(0, 1) for _ in range(world_size * rounds)]
    dealt = deal(costs, world_size)
    assert [len(own) for own in dealt] == [rounds] * world_size
    assert sorted(number for own in dealt for number in own) == list(range(len(costs)))


def test_ranks_end_together_and_are_alike_at_any_time():
    """Log-normal costs, as long-tailed as pictures are: busiest over mean of a step, and of each round in it."""
    draw = np.random.default_rng(0)
    steps, rounds = [], []
    for _ in range(200):
        costs = draw.lognormal(sigma=0.5, size=8 * 16)
        table = np.array([[costs[number] for number in own] for own in deal(costs.tolist(), 8)])
        steps.append(table.sum(1).max() / table.sum(1).mean())
        rounds += (table.max(0) / table.mean(0)).tolist()
    assert np.mean(steps) < 1.03, "in turn it would be 1.2"
    assert np.mean(rounds) < 1.1, "in turn it would be 1.9"
