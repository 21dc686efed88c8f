"""The router's losses on numbers that can be worked out by hand; under layouts: tests/distributed/test_balancing.py."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import ParallelConfig
from megatron_moellava.model.router_losses import switch_loss, z_loss


def test_balanced_routing_costs_one_and_one_expert_for_all_costs_their_number():
    tokens_1 = torch.tensor([8.0])
    even = switch_loss(torch.full((1, 4), 2.0), tokens_1, torch.full((1, 4), 4), topk=2, coefficient=1.0)
    assert float(even) == pytest.approx(1.0)
    alone_1E = torch.tensor([[8.0, 0.0, 0.0, 0.0]])
    assert float(switch_loss(alone_1E, tokens_1, alone_1E.long(), topk=1, coefficient=0.5)) == pytest.approx(0.5 * 4)


def test_each_row_is_judged_by_its_own_length():
    """A balanced row of 4 tokens and a row of 2 that one of two experts takes alone: (1 + 2) / 2."""
    scores_RE, tokens_R = torch.tensor([[2.0, 2.0], [2.0, 0.0]]), torch.tensor([4.0, 2.0])
    loss = switch_loss(scores_RE, tokens_R, torch.tensor([[2, 2], [2, 0]]), topk=1, coefficient=1.0)
    assert float(loss) == pytest.approx(1.5)


def test_choices_of_more_tokens_than_the_scores_are_of_count_as_shares():
    """global_aux_loss: what the step has seen so far is four times this micro-batch, with the same shares."""
    scores_1E, tokens_1 = torch.tensor([[1.5, 0.5]]), torch.tensor([2.0])
    once = switch_loss(scores_1E, tokens_1, torch.tensor([[1, 1]]), topk=1, coefficient=1.0)
    assert float(switch_loss(scores_1E, tokens_1, torch.tensor([[4, 4]]), topk=1, coefficient=1.0)) == float(once)


def test_a_row_without_a_real_token_costs_nothing():
    loss = switch_loss(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, 4), topk=2, coefficient=1.0)
    assert float(loss) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss_is_the_mean_over_real_tokens_in_fp32(dtype):
    parallel.initialize(ParallelConfig(), 1)
    logits_NE = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 9.0]], dtype=dtype)
    padding_N = torch.tensor([False, False, True])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert float(z_loss(logits_NE, padding_N, dist.group.WORLD, 3.0)) == pytest.approx(3.0 * expected, rel=1e-6)
