"""Seconds of a step, and what they are made of."""

import pytest

from megatron_moellava.planning.picture import time_parts
from tests.helpers.planning import found_for


def test_seconds_of_a_step_add_up():
    for item in found_for(gpus=16, overrides=["training.recompute=none"]).plans[:20]:
        assert sum(time_parts(item).values()) == pytest.approx(item.costs.step_seconds)
        assert 0 < item.costs.mfu < 0.72, "no more than the best kernels reach"
        assert item.costs.gpu_hours == pytest.approx(item.costs.hours * 16)


def test_an_imbalance_costs_memory_and_time():
    even, skewed = (found_for(imbalance=factor, gpus=4).plans[0] for factor in (1.0, 2.0))
    assert skewed.memory.margin > even.memory.margin
    assert skewed.costs.step_seconds > even.costs.step_seconds
