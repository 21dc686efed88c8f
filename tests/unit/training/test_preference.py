"""Pairs in a packed row: the same losses, gradients and numbers as those of `trl` on padded rows."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava.config import PreferenceConfig
from megatron_moellava.data.batch import Batch, Counts, total
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.training.preference import KEPT, NUMBERS, PairLoss, answer_lengths, answer_positions, next_shift
from tests.helpers.trainers import one_layout
from tests.unit.training.test_preference_losses import (
    BETA,
    LENGTH,
    PAIRS,
    TRL,
    TRL_REWARDS,
    TRL_SFT,
    log_probs,
    logits,
    tokens,
)


@pytest.fixture(scope="module", autouse=True)
def groups():
    with one_layout():
        yield


def packed(pairs: slice, tail: int = 5) -> tuple[Batch, torch.Tensor]:
    """(a row of some of the pairs, chosen and rejected in turn, with a pad tail; losses of its tokens), of the policy."""
    ids, is_answer = tokens()
    order = [row for pair in range(PAIRS)[pairs] for row in (pair, pair + PAIRS)]
    labels = torch.where(is_answer, ids, IGNORE_INDEX)[order]
    labels_AS = torch.cat([labels[:, 1:], labels.new_full((len(order), 1), IGNORE_INDEX)], dim=1)
    labels_BS = torch.cat([labels_AS.flatten(), labels.new_full((tail,), IGNORE_INDEX)])[None]
    policy, reference = logits()
    losses_AS = -policy.log_softmax(-1)[order].gather(2, labels_AS.clamp(min=0)[..., None])[..., 0]
    losses_BS = torch.cat([losses_AS.flatten(), losses_AS.new_ones(tail)])[None] * (labels_BS != IGNORE_INDEX)
    bounds = [LENGTH * number for number in range(len(order) + 1)]
    batch = Batch(
        tokens_BS=torch.ones_like(labels_BS),
        labels_BS=labels_BS,
        position_ids_BS=torch.zeros_like(labels_BS),
        padding_mask_BS=torch.arange(labels_BS.shape[1])[None] < bounds[-1],
        cu_seqlens=torch.tensor([*bounds, bounds[-1] + tail], dtype=torch.int32),
        max_seqlen=LENGTH,
        pixel_values_NCHW=torch.zeros(0, 3, 2, 2),
        pairs=list(range(PAIRS)[pairs]),
        reference_P2=log_probs(reference)[pairs],
    )
    return batch, (losses_BS, policy)


def step(options: PreferenceConfig, *parts: slice) -> tuple[dict[str, float], float, float]:
    """(numbers of a step of these micro-batches, loss, norm of the gradient with respect to the logits)."""
    made = [packed(part) for part in parts]
    counts = total(batch.counts for batch, _ in made)
    found = [PairLoss(options, counts, 1.0, 0.0)(losses_BS, batch) for batch, (losses_BS, _) in made]
    gradients = [torch.autograd.grad(loss, policy)[0] for (loss, _), (_, (_, policy)) in zip(found, made, strict=True)]
    numbers = sum(numbers for _, numbers in found)
    return (
        dict(zip(NUMBERS, numbers.tolist(), strict=True)),
        float(sum(loss for loss, _ in found)),
        float(sum(gradients).norm()),
    )


SPLITS = [(slice(0, 3),), (slice(0, 1), slice(1, 3))]


@pytest.mark.parametrize("parts", SPLITS, ids=["one row", "two micro-batches"])
@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_packed_pairs_have_the_loss_of_trl(name, parts):
    numbers, loss, norm = step(PreferenceConfig(loss=name, beta=BETA), *parts)
    assert (loss, norm) == pytest.approx(TRL[name], rel=1e-6)
    assert numbers["loss"] == pytest.approx(loss)
    assert {key: numbers[key] for key in TRL_REWARDS} == pytest.approx(TRL_REWARDS)
    assert numbers["nll_loss"] == pytest.approx(TRL_SFT[0])


@pytest.mark.parametrize("parts", SPLITS, ids=["one row", "two micro-batches"])
def test_mpo_is_the_sum_of_its_parts(parts):
    options = PreferenceConfig(beta=BETA, loss_coeff=0.8, quality_coeff=0.2, sft_coeff=1.0)
    _, loss, _ = step(options, *parts)
    assert loss == pytest.approx(0.8 * TRL["dpo"][0] + 0.2 * TRL["quality"][0] + TRL_SFT[0])
    _, loss, norm = step(replace(options, loss_coeff=0.0, quality_coeff=0.0), *parts)
    assert (loss, norm) == pytest.approx(TRL_SFT)


def test_a_row_counts_its_pairs_and_their_tokens():
    batch, _ = packed(slice(0, 3))
    assert answer_lengths(batch, answer_positions(batch)).tolist() == [[2, 6], [5, 4], [3, 2]]
    assert (batch.counts.pairs, batch.counts.chosen_tokens, batch.counts.loss_tokens) == (3, 10, 22)
    assert Counts(*[1] * 7).pairs == 0


def test_the_mean_reward_follows_the_steps():
    numbers = {"rewards/chosen": 3.0, "rewards/rejected": 1.0}
    assert next_shift(0.0, numbers) == pytest.approx(2.0 * (1 - KEPT))
    assert next_shift(2.0, numbers) == pytest.approx(2.0)
