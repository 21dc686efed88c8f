"""Experts on ranks: nobody is lost, kinds stay among their own, and the busiest rank has no more than before."""

import itertools
import random

import pytest

from megatron_moellava.config import ExpertGroups, MoEConfig
from megatron_moellava.costs.expert_places import busiest_over_mean, kinds_of_places, level_order, load_of_ranks


def best_of_all(loads_E, ranks, kinds):
    """By trying every order."""
    orders = (
        order
        for order in itertools.permutations(range(len(loads_E)))
        if all(kinds[place] == kinds[expert] for place, expert in enumerate(order))
    )
    return min(busiest_over_mean([loads_E[expert] for expert in order], ranks) for order in orders)


@pytest.mark.parametrize("seed", range(8))
def test_the_busiest_rank_has_little_more_than_in_the_best_of_all_orders(seed):
    draw = random.Random(seed)
    loads_E = [draw.paretovariate(1.5) for _ in range(6)]
    for ranks in (2, 3):
        order = level_order(loads_E, ranks, [()] * 6)
        assert sorted(order) == list(range(6))
        found = busiest_over_mean([loads_E[expert] for expert in order], ranks)
        assert best_of_all(loads_E, ranks, [()] * 6) <= found * (1 + 1e-12)
        assert found <= 1.03 * best_of_all(loads_E, ranks, [()] * 6)
        assert found <= busiest_over_mean(loads_E, ranks)


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_moe_experts=8, moe_router_topk=2, expert_groups=ExpertGroups(image=4, text=2, shared=2)),
        MoEConfig(num_moe_experts=8, moe_router_topk=2, moe_router_num_groups=4, moe_router_group_topk=2),
    ],
    ids=["of a modality", "chosen by groups"],
)
def test_experts_stay_among_their_own(moe):
    kinds = kinds_of_places(moe)
    assert len(set(kinds)) > 1
    order = level_order([1, 9, 2, 8, 3, 7, 4, 6], 2, kinds)
    assert sorted(order) == list(range(8)) and all(kinds[place] == kinds[expert] for place, expert in enumerate(order))


def test_groups_that_lie_across_ranks_are_levelled_within_themselves():
    kinds = [("image",)] * 3 + [("text",)] * 3  # three experts on each of two ranks; dealt, each rank has of both
    dealt = [kinds[0], kinds[3], kinds[0], kinds[3], kinds[0], kinds[3]]
    loads_E = [9, 1, 8, 1, 2, 1]  # 18 on the first rank, which has two of the images, and 4 on the second
    order = level_order(loads_E, 2, dealt)
    assert all(dealt[place] == dealt[expert] for place, expert in enumerate(order))
    assert sorted(load_of_ranks([loads_E[expert] for expert in order], 2)) == [11, 11]


def test_what_is_level_stays_as_it_is():
    assert level_order([5, 5, 5, 5], 2, [()] * 4) == [0, 1, 2, 3]
    assert level_order([4, 1, 2, 3], 2, [()] * 4) == [0, 1, 2, 3]
    assert level_order([0, 0, 0, 0], 2, [()] * 4) == [0, 1, 2, 3]


def test_experts_that_stay_on_their_rank_keep_their_places():
    order = level_order([6, 5, 1, 0, 0, 0], 2, [()] * 6)  # 12 against 0: one of the heavy ones goes over
    size = 3
    assert max(load_of_ranks([[6, 5, 1, 0, 0, 0][expert] for expert in order], 2)) == 6
    assert all(order[expert] == expert for place, expert in enumerate(order) if place // size == expert // size)
