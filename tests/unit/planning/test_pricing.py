"""Seconds of a step, and what they are made of."""

from dataclasses import replace

import pytest

from megatron_moellava.config import TowerMoEConfig
from megatron_moellava.costs.gpus import GPUS
from megatron_moellava.costs.stage_work import Load
from megatron_moellava.planning.picture import time_parts
from megatron_moellava.planning.pricing import Pricing, rank_time
from tests.helpers.planning import found_for, layout_of


def test_seconds_of_a_step_add_up():
    for item in found_for(gpus=16, overrides=["training.recompute=none"]).plans[:20]:
        assert sum(time_parts(item).values()) == pytest.approx(item.costs.step_seconds)
        assert 0 < item.costs.mfu < 0.72, "no more than the best kernels reach"
        assert item.costs.gpu_hours == pytest.approx(item.costs.hours * 16)


def test_an_imbalance_costs_memory_and_time():
    even, skewed = (found_for(imbalance=factor, gpus=4).plans[0] for factor in (1.0, 2.0))
    assert skewed.memory.margin > even.memory.margin
    assert skewed.costs.step_seconds > even.costs.step_seconds


def test_the_experts_of_the_tower_cost_their_way_to_other_ranks():
    """Again where the tower is recomputed; on the first pipeline stage alone; nothing where all experts are at home."""
    load = Load(tokens=2048, length=512, images=3, samples=3)
    pricing = Pricing(gpu=GPUS["h100"])

    def expert_seconds(tower_moe: TowerMoEConfig | None, ep: int = 4, **settings) -> list[float]:
        sizes = {"parallel__pipeline_model_parallel_size": 2, "parallel__expert_model_parallel_size": ep}
        layout = layout_of(training__trains=("tower", "projector"), **sizes, **settings)
        layout = replace(layout, run=replace(layout.run, tower_moe=tower_moe))
        return [rank_time(layout, rank, pricing, load).expert for rank in range(2)]

    dense, sparse = (expert_seconds(mixture) for mixture in (None, TowerMoEConfig()))
    again = expert_seconds(TowerMoEConfig(), training__recompute_tower=True)
    assert sparse[0] > dense[0] and sparse[1] == dense[1]
    assert again[0] - dense[0] == pytest.approx(1.5 * (sparse[0] - dense[0]))
    assert expert_seconds(TowerMoEConfig(), ep=1) == [0, 0]
