"""Rows, copies and load of ranks, beside a count token by token."""

import numpy as np
import pytest

from megatron_moellava.analysis.traffic import divisions, traffic
from megatron_moellava.config import ExpertGroups, MoEConfig
from megatron_moellava.costs.expert_traffic import busiest_rank, copies_to_others, rows_to_others
from megatron_moellava.routers import admissible_experts


def test_two_tokens_by_hand():
    found = traffic(np.array([[[0, 1]], [[1, 2]]]), 4, 2)
    assert (found.rows, found.copies, found.busiest) == pytest.approx((1.0, 0.75, 3 / 2))
    assert found.wait_share == pytest.approx(1 - 2 / 3)


def test_dropped_choices_are_sent_nowhere():
    found = traffic(np.array([[[0, -1]], [[3, -1]]]), 4, 2)
    assert (found.rows, found.copies, found.busiest, found.wait_share) == pytest.approx((0.5, 0.5, 1.0, 0.0))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("groups", [None, ExpertGroups(image=3, text=3, shared=2)])
def test_even_routes_give_what_is_predicted(groups, ranks):
    """The two counts of this program, of recorded routes and of an expectation, are one."""
    moe = MoEConfig(num_moe_experts=8, expert_groups=groups)
    draw, text_and_image = np.random.default_rng(1), admissible_experts(moe)
    is_image_T = draw.random(20_000) < 0.7
    choices = [draw.permutation(text_and_image[int(is_image)])[:2] for is_image in is_image_T]
    found = traffic(np.array(choices)[:, None], 8, ranks)
    assert found.rows == pytest.approx(rows_to_others(moe, ranks))
    assert found.copies == pytest.approx(copies_to_others(moe, ranks, 0.7), rel=0.01)
    assert found.busiest == pytest.approx(busiest_rank(moe, ranks, 0.7), rel=0.02)


def test_ranks_divide_the_experts():
    assert (
        divisions(8) == [2, 4, 8] and divisions(6) == [2, 3, 6] and divisions(64, 4) == [2, 4] and divisions(5) == [5]
    )
