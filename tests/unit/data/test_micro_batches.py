"""Micro-batches in the order of a stream, and the position to resume at."""

import gc
import itertools

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.data.loader import started
from megatron_moellava.data.micro_batches import MicroBatches
from megatron_moellava.data.order import Stream


class Echo:
    """A pipeline that answers with the numbers it is asked for."""

    def __getitem__(self, numbers):
        return {"batch": numbers, "events": None}


def engine(num_workers: int = 0) -> MicroBatches:
    stream = Stream(lambda epoch: [[10 * epoch + item] for item in range(5)], group=1, rank=0, world_size=1)
    return MicroBatches(Echo(), stream, num_workers=num_workers)


def take(made: MicroBatches, count: int) -> list:
    return [(item["epoch"], item["batch"]) for item in itertools.islice(made, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_come_in_the_streams_order_whoever_makes_them(num_workers):
    assert take(engine(num_workers), 7) == [(0, [0]), (0, [1]), (0, [2]), (0, [3]), (0, [4]), (1, [10]), (1, [11])]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_is_that_of_what_was_delivered_not_of_what_is_on_its_way(num_workers):
    first = engine(num_workers)
    take(first, 3)
    assert first.save() == {"epoch": 0, "position": 3}
    second = engine()
    second.restore(first.save())
    assert take(second, 3) == [(0, [3]), (0, [4]), (1, [10])]
    assert second.items(0) == 5


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_midst_of_a_dealt_step_is_a_position_as_well(num_workers):
    def dealt() -> MicroBatches:
        plan = lambda epoch: [[10 * epoch + item] for item in range(5)]  # noqa: E731
        stream = Stream(plan, group=1, rank=1, world_size=2, cost=lambda items: float(items[0][0]), rounds=2)
        return MicroBatches(Echo(), stream, num_workers=num_workers)

    first = dealt()
    whole = take(dealt(), 8)
    take(first, 3)
    assert first.save() == {"epoch": 0, "position": 4, "rounds": 1}
    second = dealt()
    second.restore(first.save())
    assert take(second, 5) == whole[3:]
    assert "rounds" not in second.save(), "a whole step has been taken"


@pytest.mark.parametrize(
    "saved",
    [
        {"epoch": 0, "position": 6},
        {"epoch": -1, "position": 0},
        {"epoch": 0, "position": "1"},
        {"epoch": 0, "position": 0, "rounds": 1},
    ],
)
def test_a_position_that_does_not_exist_is_damage(saved):
    with pytest.raises(DataError, match="cannot be restored"):
        engine().restore(saved)


class Frozen:
    """A pipeline that tells how many objects its process's collector leaves alone."""

    def __getitem__(self, numbers):
        return {"batch": gc.get_freeze_count(), "events": None}


def test_workers_leave_the_garbage_of_their_parent_alone():
    made = engine(1)
    made.pipeline = Frozen()
    iterator = started(made)
    assert gc.get_freeze_count() == 0
    assert next(iterator)["batch"] > 0
