"""What is expected of even routers, beside a count over every choice that a token could make."""

from itertools import combinations

import pytest

from megatron_moellava.config import ExpertGroups, MoEConfig
from megatron_moellava.costs.expert_traffic import busiest_rank, copies_to_others, rows_to_others
from megatron_moellava.routers import admissible_experts

PLAIN = MoEConfig(num_moe_experts=8)
BINNED = MoEConfig(num_moe_experts=8, expert_groups=ExpertGroups(image=3, text=3, shared=2))
DEALT = MoEConfig(num_moe_experts=8, expert_groups=ExpertGroups(image=4, text=2, shared=2, order="dealt"))
SOFT = MoEConfig(num_moe_experts=8, expert_groups=ExpertGroups(image=4, text=4, penalty=1.0))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("moe", [PLAIN, BINNED, DEALT, SOFT])
def test_it_is_the_mean_over_all_choices_and_homes(moe, ranks):
    image_share, size = 0.75, 8 // ranks
    rows = copies = 0.0
    loads = [0.0] * ranks
    for share, experts in zip((1 - image_share, image_share), admissible_experts(moe), strict=True):
        pairs = list(combinations(experts, 2))
        for pair in pairs:
            weight = share / len(pairs) / ranks
            for home in range(ranks):
                rows += weight * sum(expert // size != home for expert in pair)
                copies += weight * len({expert // size for expert in pair} - {home})
            for expert in pair:
                loads[expert // size] += share / len(pairs)
    assert rows_to_others(moe, ranks) == pytest.approx(rows)
    assert copies_to_others(moe, ranks, image_share) == pytest.approx(copies)
    assert busiest_rank(moe, ranks, image_share) == pytest.approx(max(loads) * ranks / 2)


def test_neighbours_of_one_modality_save_copies_and_cost_level_ranks():
    grouped = MoEConfig(expert_groups=ExpertGroups(image=2, text=2))
    assert copies_to_others(MoEConfig(), 2, 0.8) == pytest.approx(5 / 6)
    assert copies_to_others(grouped, 2, 0.8) == pytest.approx(1 / 2)
    assert busiest_rank(MoEConfig(), 2, 0.8) == pytest.approx(1.0)
    assert busiest_rank(grouped, 2, 0.8) == pytest.approx(1.6)
