"""DeepSpeed 0.9.5's gates on examples worked by hand; the recordings of the original are compared in tests/parity."""

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.original_gate import (
    OriginalGate,
    expert_capacity,
    gumbel,
    no_noise,
    top1_gate,
    top2_gate,
)

LOGITS_NE = torch.tensor([[3.0, 1.0, 0.0], [3.0, 2.0, 0.0], [3.0, 0.0, 1.0]])  # everybody wants expert 0


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "topk", "least", "slots"),
    [(100, 4, 1.5, 2, 0, 75), (5, 4, 1.0, 1, 4, 4), (5, 4, 1.0, 1, 0, 2), (6, 3, 1.0, 1, 0, 2)],
)
def test_capacity_is_rounded_up_and_has_a_least_value(tokens, experts, factor, topk, least, slots):
    assert expert_capacity(tokens, experts, factor, topk, least) == slots


def test_two_experts_with_room_for_all_share_by_their_probabilities():
    gate = top2_gate(LOGITS_NE, 3, torch.zeros_like(LOGITS_NE))
    assert gate.choices_NK.tolist() == [[0, 1], [0, 1], [0, 2]]
    assert gate.routing_map_NE.sum(dim=1).tolist() == [2, 2, 2]
    assert torch.allclose(gate.probs_NE[0, :2], LOGITS_NE[0, :2].softmax(0)) and gate.probs_NE[0, 2] == 0
    assert torch.allclose(gate.probs_NE.sum(dim=1), torch.ones(3))


def test_a_full_expert_takes_the_first_by_position_and_the_rest_gives_its_weight_to_the_other_choice():
    gate = top2_gate(LOGITS_NE, 2, torch.zeros_like(LOGITS_NE))
    assert gate.routing_map_NE[:, 0].tolist() == [True, True, False]  # token 2 comes too late
    assert gate.probs_NE[2].tolist() == [0.0, 0.0, 1.0]
    assert gate.slots_NE[:, 0].tolist() == [0, 1, -1]


def test_first_choices_stand_in_front_of_second_choices_in_every_queue():
    """Token 0 asks for expert 1 second, token 1 asks for it first: with one place it is token 1's."""
    logits_NE = torch.tensor([[3.0, 2.0, 0.0], [0.0, 3.0, 2.0]])
    gate = top2_gate(logits_NE, 1, torch.zeros_like(logits_NE))
    assert gate.routing_map_NE[:, 1].tolist() == [False, True]
    assert gate.probs_NE[0].tolist() == [1.0, 0.0, 0.0]


def test_noise_decides_the_second_choice_and_never_the_first():
    noise_NE = torch.tensor([[-100.0, 0.0, 50.0]]).expand(3, -1)
    assert top2_gate(LOGITS_NE, 3, noise_NE).choices_NK.tolist() == [[0, 2]] * 3


def test_one_expert_is_weighted_by_its_raw_probability_and_noise_decides_who_stays():
    uniform_NE = torch.tensor([[0.1, 0.0, 0.0], [0.9, 0.0, 0.0], [0.5, 0.0, 0.0]])
    gate = top1_gate(LOGITS_NE, 2, uniform_NE)
    assert gate.routing_map_NE[:, 0].tolist() == [False, True, True]
    assert torch.allclose(gate.probs_NE[1, 0], LOGITS_NE[1].softmax(0)[0])
    assert gate.probs_NE[0].sum() == 0
    assert gate.slots_NE[:, 0].tolist() == [-1, 0, 1]


def test_the_balance_loss_is_one_when_balanced_and_the_number_of_experts_at_worst():
    balanced = torch.eye(4).mul(50.0)
    collapsed = torch.zeros(4, 4)
    collapsed[:, 0] = 50.0
    zeros = torch.zeros(4, 4)
    assert float(top2_gate(balanced, 4, zeros).aux_loss) == pytest.approx(1.0)
    assert float(top2_gate(collapsed, 4, zeros).aux_loss) == pytest.approx(4.0)


def test_a_gate_takes_its_capacity_by_its_mode_and_noise_from_its_source():
    moe = MoEConfig(
        num_moe_experts=3, router="original", moe_expert_capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=0
    )
    asked = []

    def noise(logits_NE, draw):
        asked.append(draw)
        return torch.zeros_like(logits_NE)

    gate = OriginalGate(moe, noise)
    assert gate(LOGITS_NE).capacity == 2  # 3 tokens * 2 choices / 3 experts
    assert gate.eval()(LOGITS_NE).capacity == 4
    gate.drops = False
    assert gate(LOGITS_NE).capacity == len(LOGITS_NE)
    assert asked == [gumbel] * 3
    single = OriginalGate(MoEConfig(router="original", moe_router_topk=1, moe_expert_capacity_factor=1.0), noise)
    single(LOGITS_NE)
    assert asked[-1] is torch.rand


def test_a_deterministic_second_choice_asks_for_no_noise():
    moe = MoEConfig(router="original", moe_expert_capacity_factor=2.0, second_choice="deterministic")

    def refuse(logits_NE, draw):
        raise AssertionError("noise was drawn")

    assert OriginalGate(moe, refuse)(LOGITS_NE).choices_NK.tolist() == [[0, 1], [0, 1], [0, 2]]


def test_gumbel_noise_draws_in_proportion_to_the_probabilities():
    torch.manual_seed(0)
    logits_E = torch.tensor([0.5, 0.3, 0.2]).log()
    chosen = (logits_E + gumbel((20_000, 3), torch.device("cpu"))).argmax(dim=1)
    shares = torch.bincount(chosen, minlength=3) / 20_000
    assert torch.allclose(shares, logits_E.exp(), atol=0.012)  # three standard deviations
    assert not no_noise(LOGITS_NE, gumbel).any()
