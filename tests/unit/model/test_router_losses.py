"""Losses of a router against their formulas; layouts of several ranks are in tests/distributed."""

import math

import pytest
import torch

from megatron_moellava.model.router_losses import reduced, switch_loss, z_loss

E, K = 4, 2


def switch(probs_NE: torch.Tensor, chosen_NE: torch.Tensor, coefficient: float = 1.0) -> torch.Tensor:
    """Of all tokens together."""
    tokens = torch.tensor([len(probs_NE)])
    return switch_loss(probs_NE.sum(0)[None], tokens, chosen_NE.sum(0)[None], K, coefficient)


def test_balance_is_one_and_collapse_the_number_of_experts_over_the_choices():
    even = torch.full((6, E), 1 / E)
    spread = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]] * 3)
    assert float(switch(even, spread)) == pytest.approx(1.0)
    certain = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(6, E)
    assert float(switch(certain, torch.tensor([[1, 1, 0, 0]]).expand(6, E))) == pytest.approx(E / K)


def test_it_is_the_formula_and_scales_with_its_coefficient():
    torch.manual_seed(0)
    probs_NE = torch.randn(9, E).softmax(-1)
    chosen_NE = torch.zeros(9, E).scatter(1, probs_NE.topk(K).indices, 1.0)
    expected = E * (chosen_NE.mean(0) / K * probs_NE.mean(0)).sum()
    assert float(switch(probs_NE, chosen_NE)) == pytest.approx(float(expected))
    assert float(switch(probs_NE, chosen_NE, 0.01)) == pytest.approx(0.01 * float(expected))


def test_rows_of_any_length_are_judged_each_on_its_own():
    """Rows of two and of six tokens count alike: the loss is the mean of what each gives alone."""
    torch.manual_seed(0)
    rows = [torch.randn(length, E).softmax(-1) for length in (2, 6)]
    chosen = [torch.zeros(len(row), E).scatter(1, row.topk(K).indices, 1.0) for row in rows]
    alone = [float(switch(row, ones)) for row, ones in zip(rows, chosen, strict=True)]
    scores_RE, counts_RE = (torch.stack([item.sum(0) for item in part]) for part in (rows, chosen))
    together = switch_loss(scores_RE, torch.tensor([2, 6]), counts_RE, K, 1.0)
    assert float(together) == pytest.approx(sum(alone) / 2)


def test_a_row_without_tokens_costs_nothing():
    zeros = torch.zeros(1, E)
    assert float(switch_loss(zeros, torch.tensor([0]), zeros, K, 1.0)) == 0.0


def test_the_gradient_goes_through_the_probabilities_alone():
    logits_NE = torch.randn(5, E, requires_grad=True)
    probs_NE = logits_NE.softmax(-1)
    switch(probs_NE, torch.zeros(5, E).scatter(1, probs_NE.topk(K).indices, 1.0)).backward()
    assert logits_NE.grad.abs().sum() > 0


def test_z_loss_is_the_mean_square_of_the_real_tokens_normalisers(world):
    logits_NE, padding_N = torch.randn(6, E), torch.tensor([False] * 4 + [True] * 2)
    group = torch.distributed.group.WORLD
    expected = 0.1 * logits_NE.logsumexp(-1).square()
    assert float(z_loss(logits_NE, None, group, 0.1)) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert float(z_loss(logits_NE, padding_N, group, 0.1)) == pytest.approx(float(expected[:4].mean()), rel=1e-5)


def test_counts_of_one_rank_stay_as_they_are_and_lose_their_graph(world):
    counts = torch.ones(3, requires_grad=True) * 2
    found = reduced(counts, torch.distributed.group.WORLD)
    assert found.tolist() == [2, 2, 2] and not found.requires_grad and found is not counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss_is_computed_in_fp32_whatever_the_routers_dtype(dtype, world):
    logits_NE = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 9.0]], dtype=dtype)
    padding_N = torch.tensor([False, False, True])
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert float(z_loss(logits_NE, padding_N, torch.distributed.group.WORLD, 3.0)) == pytest.approx(
        3 * expected, rel=1e-6
    )
