"""Which sample comes when: every sample of an epoch once, the same for any number of ranks."""

import itertools
from collections import Counter

import pytest

from megatron_moellava.data.order import Position, Share, Stream, sample_order


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own():
    shares = [Share(30), Share(7)]
    epochs = [sample_order(shares, seed=1, epoch=epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sample_order(shares, seed=1, epoch=1) == epochs[1] != sample_order(shares, seed=2, epoch=1)


def test_a_weight_is_how_often_a_row_comes_in_an_epoch():
    double = Counter(sample_order([Share(5, 2.0)], 1, 0))
    assert set(double.values()) == {2} and len(double) == 5
    halves = [sample_order([Share(10, 0.5)], 1, epoch) for epoch in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(10)), "each epoch shows the other half"
    thirds = Counter(itertools.chain(*(sample_order([Share(10, 0.75)], 1, epoch) for epoch in range(4))))
    assert set(thirds.values()) == {3}


def test_sources_are_mixed_evenly():
    order = sample_order([Share(100), Share(20)], 1, 0)
    for start in range(0, 120, 30):
        assert 3 <= sum(number >= 100 for number in order[start : start + 30]) <= 7  # 5 of 30


def test_rows_that_stay_together_are_read_in_sequence():
    order = sample_order([Share(12, run=4)], 3, 0)
    assert all(order[start : start + 4] == list(range(order[start], order[start] + 4)) for start in (0, 4, 8))


def micro_batches(count: int, group: int, world_size: int, epoch: int = 0, position: int = 0) -> list[list[int]]:
    """The first of a stream of epochs of seven items, in the order of all ranks."""
    ranks = [
        Stream(
            lambda number: [[10 * number + item] for item in range(7)], group=group, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    streams = [rank.from_(Position(epoch, position)) for rank in ranks]
    return [next(streams[number % world_size])[1] for number in range(count)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_one_stream_that_goes_on_into_the_next_epoch(world_size):
    assert micro_batches(15, 2, world_size) == micro_batches(15, 2, 1)
    assert micro_batches(4, 2, world_size) == [[0, 1], [2, 3], [4, 5], [6, 10]]


def test_a_position_is_all_there_is_to_resume():
    whole = micro_batches(12, 2, 1)
    stream = Stream(lambda number: [[10 * number + item] for item in range(7)], group=2, rank=0, world_size=2)
    *_, position = list(itertools.islice(stream.from_(Position(0, 0)), 3))[-1]  # after six micro-batches of two ranks
    assert position == Position(1, 5)
    assert micro_batches(6, 2, 3, position.epoch, position.items) == whole[6:]


def dealt(world_size: int, rank: int) -> Stream:
    """Epochs of seven items whose cost is their number squared; steps of four."""
    return Stream(
        lambda number: [[10 * number + item] for item in range(7)],
        group=1,
        rank=rank,
        world_size=world_size,
        cost=lambda items: float(items[0][0] % 10) ** 2,
        rounds=4 // world_size,
    )


def steps_of(world_size: int, count: int) -> list[list[int]]:
    """Samples of each step, rank after rank."""
    streams = [dealt(world_size, rank).from_(Position(0, 0)) for rank in range(world_size)]
    return [[next(stream)[1][0] for stream in streams for _ in range(4 // world_size)] for _ in range(count)]


def test_a_step_that_is_dealt_by_cost_holds_the_same_for_any_number_of_ranks():
    assert steps_of(1, 3) == [[0, 1, 2, 3], [4, 5, 6, 10], [11, 12, 13, 14]], "one rank takes them as they come"
    assert steps_of(2, 3) == [[0, 3, 1, 2], [10, 6, 4, 5], [11, 14, 12, 13]]
    assert [sorted(step) for step in steps_of(4, 3)] == steps_of(1, 3)


@pytest.mark.parametrize("taken", range(9))
def test_a_position_in_the_midst_of_a_dealt_step_is_exact(taken):
    whole = list(itertools.islice(dealt(2, 1).from_(Position(0, 0)), 14))
    position = whole[taken - 1][2] if taken else Position(0, 0)
    assert position.rounds == taken % 2
    again = list(itertools.islice(dealt(2, 1).from_(position), 5))
    assert again == whole[taken : taken + 5]
