"""A slow rank is named, and nobody else."""

import pytest

from megatron_moellava.training.stragglers import Stragglers


@pytest.fixture
def stragglers(monkeypatch) -> Stragglers:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    return Stragglers(10)


def test_slow_rank_is_named_at_the_second_measurement(stragglers):
    seconds = [1.0, 1.1, 1.0, 2.0]
    numbers, message = stragglers._judge(seconds)
    assert message is None and numbers == {"slowest_rank": 3.0, "slowest_rank_ratio": 2.0}
    _, message = stragglers._judge(seconds)
    assert message.startswith("rank 3 is slow: 2.000 s of its own work a step, the median rank has 1.000 s")


def test_hiccups_and_even_ranks_are_not_reported(stragglers):
    for seconds in ([1, 1, 1, 2], [2, 1, 1, 1], [1, 1, 1, 2], [1, 1.1, 1.2, 1.25], [1, 1, 1, 2]):
        assert stragglers._judge(seconds)[1] is None
