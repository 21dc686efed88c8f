"""What the quickstart says about its time, from a probe's."""

import pytest


@pytest.fixture
def modules():
    import plans
    import speed

    return speed, plans


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_run_of_every_preset_has_a_cost(modules, precision):
    speed, plans = modules
    alone, both = (speed.Speed(0.01, processes, precision) for processes in (1, 2))
    for plan in (plan for preset in plans.PLANS.values() for plan in preset.values()):
        none, some = (alone.training(steps, 0, plan) for steps in (0, 100))
        assert none == speed.START_SECONDS < some
        assert both.training(100, 0, plan) - none == pytest.approx((some - none) / 2), "each has one of the two rows"
        assert alone.training(0, 100, plan) > none


def test_experts_cost_more_and_the_small_model_less(modules):
    speed, plans = modules
    here = speed.Speed(0.01, 2, "bf16")
    took = {name: here.training(100, 0, plan) for name, plan in plans.PLANS["names"].items()}
    assert took["names"] == took["names_dense"] < took["names_moe"] < took["dense"] < took["stage3"]


def test_of_a_gpu_nothing_is_said(modules):
    speed, plans = modules
    there = speed.Speed(0.0, 1, "bf16")
    assert there.training(600, 2000, plans.PERCEPTION["stage2"]) == there.tower(1400) == 0
    assert speed.said_time(400) == "this should take about 7 min here"


def test_a_pass_of_the_probe_is_a_mean_over_its_second(modules):
    speed, _ = modules
    ticks = iter(range(1000))
    assert speed.seconds_of_a_pass("fp32", lambda: next(ticks) * 0.25) == pytest.approx(1 / 3)
