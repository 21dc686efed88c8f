"""Splits of the decoder over pipeline stages: the cost model, and the best contiguous split by brute force."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.config import RunConfig, from_dict
from megatron_moellava.costs.pipeline_split import balanced, first_stage_cost, layer_costs, stage_costs, stage_layers

BACKBONE = BACKBONES["vicuna-7b-v1.5"]


def run(stages: int = 4, split="cost", **more) -> RunConfig:
    tree = {
        "model": {"backbone": BACKBONE.name},
        "training": {"stage": 2} | more.pop("training", {}),
        "parallel": {"pipeline_model_parallel_size": stages, "pipeline_split": split},
        **more,
    }
    return from_dict(RunConfig, tree)


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (2.0, 0.5), (9.0, 0.0), (0.3, 4.0)])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_split_is_the_best_of_all(first, last, stages):
    costs = [1.0, 2.5, 1.0, 2.5, 1.0, 2.5, 1.0, 2.5]

    def dearest(numbers) -> float:
        edges = [0]
        for number in numbers:
            edges.append(edges[-1] + number)
        found = [sum(costs[a:b]) for a, b in pairwise(edges)]
        found[0] += first
        found[-1] += last
        return max(found)

    ways = [[b - a for a, b in pairwise([0, *cut, 8])] for cut in combinations(range(1, 8), stages - 1)]
    assert dearest(balanced(costs, stages, first, last)) == min(map(dearest, ways))


def test_example_of_the_docstring():
    assert balanced([1.0] * 4, 2, 2.0, 0.0) == [1, 3]


def test_first_stage_holds_fewer_layers_where_the_tower_is_trained():
    """A trained CLIP-L costs 1.1 layers of a 7B model, the logits 0.6; a frozen one 0.4, which moves no layer of 32."""
    assert stage_layers(run(), BACKBONE) == [8, 8, 8, 8]
    trained = run(training={"trains": ["tower", "language.ffn"]})
    layers = stage_layers(trained, BACKBONE)
    assert sum(layers) == 32 and layers[0] == 7
    assert max(stage_costs(trained, BACKBONE, layers)) < max(stage_costs(trained, BACKBONE, [8] * 4))


def test_costs_are_those_of_the_products():
    """By hand: Vicuna's layer has 2 H (4 H^2 + 3 H F) multiplications a token and half a square of attention."""
    one = run(data={"seq_length": 1024})
    hidden, inner = 4096, 11008
    forward = 2 * 1024 * (4 * hidden**2 + 3 * hidden * inner + hidden * 1024)
    assert layer_costs(one, BACKBONE) == [3 * forward] * 32
    moe = replace(one, moe=from_dict(RunConfig, {"model": {"backbone": ""}, "training": {"stage": 3}, "moe": {}}).moe)
    more = [cost - 3 * forward for cost in layer_costs(moe, BACKBONE)]
    router = 3 * 2 * 1024 * 4 * hidden
    extra = 3 * 2 * 1024 * 3 * hidden * inner + router  # two experts instead of one FFN, in every second layer
    assert more == [extra, 0] * 16


def test_a_trained_tower_costs_three_times_a_frozen_one():
    frozen, trained = run(), run(training={"trains": ["tower"]})
    assert first_stage_cost(trained, BACKBONE) == pytest.approx(3 * first_stage_cost(frozen, BACKBONE))


def test_even_split_is_left_to_megatron_core_and_numbers_are_taken_as_they_are():
    assert stage_layers(run(split="even"), BACKBONE) is None
    assert stage_layers(run(split=[5, 9, 9, 9]), BACKBONE) == [5, 9, 9, 9]
