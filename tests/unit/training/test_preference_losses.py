"""Losses of pairs against those of `trl` 1.16.0, whose trainers computed the numbers below on the same logits.

DPOTrainer and KTOTrainer were given the log-probabilities of `log_probs`, with beta 0.3, in fp64.
"""

import pytest
import torch

from megatron_moellava.training.preference_losses import LOSSES, quality

PAIRS, LENGTH, VOCABULARY, BETA = 3, 12, 11, 0.3
PROMPT = 4  # tokens before each answer
# loss of the batch, norm of its gradient with respect to the policy's logits
TRL = {
    "dpo": (1.2683321615006726, 0.3562382183696707),
    "ipo": (6.742205599294202, 2.3850845735627444),
    "quality": (2.262705418207553, 0.2989913423620451),
    "kto": (0.5531041202745146, 0.0466250687386321),
}
# the KL divergence that KTO compares with: negative ones count as 0
TRL_KTO = {1.1: (0.5436837062944047, 0.04309055162931293), -2.0: TRL["kto"]}
TRL_SFT = (3.4515689608381117, 0.3246634646867381)
TRL_REWARDS = {
    "rewards/chosen": -1.4415642100485304,
    "rewards/rejected": -0.5923961492752406,
    "rewards/accuracies": 1 / 3,
    "rewards/margins": -0.84916806077329,
}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """([2P, S] ids, [2P, S] which of them are answers): rows are the chosen answers, then the rejected ones."""
    rows, places = torch.arange(2 * PAIRS)[:, None], torch.arange(LENGTH)[None]
    ids = (5 * rows + 3 * places + rows * places) % VOCABULARY
    return ids, (places >= PROMPT) & (places < PROMPT + 2 + 3 * rows % 5)


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """[2P, S, V] of the policy and of the reference."""
    counted = torch.arange(2 * PAIRS * LENGTH * VOCABULARY, dtype=torch.float64).view(2 * PAIRS, LENGTH, VOCABULARY)
    return (2 * torch.sin(counted * 0.7)).requires_grad_(), 2 * torch.cos(counted * 1.3)


def log_probs(of: torch.Tensor) -> torch.Tensor:
    """[P, 2] of the answers, from logits."""
    ids, is_answer = tokens()
    found = of[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * is_answer[:, 1:]
    return found.sum(1).view(2, PAIRS).T


def measured(loss, shift: float = 0.0) -> tuple[float, float]:
    policy, reference = logits()
    lengths_P2 = tokens()[1].sum(1).view(2, PAIRS).T
    value = loss(log_probs(policy) - log_probs(reference), lengths_P2, BETA, shift).mean()
    value.backward()
    return float(value.detach()), float(policy.grad.norm())


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_those_of_trl(name):
    assert measured((LOSSES | {"quality": quality})[name]) == pytest.approx(TRL[name], rel=1e-9)


@pytest.mark.parametrize("divergence", TRL_KTO)
def test_kto_compares_with_the_divergence_from_the_reference(divergence):
    assert measured(LOSSES["kto"], BETA * divergence) == pytest.approx(TRL_KTO[divergence], rel=1e-9)


def test_a_shift_of_all_rewards_is_no_quality():
    """BCO: what counts is how far an answer's reward is from the mean."""
    ratios_P2, lengths_P2 = torch.tensor([[0.5, -0.25]], dtype=torch.float64), torch.ones(1, 2)
    assert torch.allclose(
        quality(ratios_P2 + 2.0, lengths_P2, BETA, 2.0 * BETA), quality(ratios_P2, lengths_P2, BETA, 0.0)
    )
