"""The objective of stage 4: the loss of pairs of answers from the losses of their tokens.

A packed row holds pairs: segments 2p and 2p + 1 are the chosen and the rejected answer of pair p, each behind its prompt,
which has no labels. Suffixes: B rows (one), S positions, L those of this context-parallel rank, A answers, P pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from megatron_moellava import parallel, platform
from megatron_moellava.config import PreferenceConfig
from megatron_moellava.data.batch import Batch, Counts
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.model.context_parallel import share
from megatron_moellava.training.preference_losses import LOSSES, quality

from megatron.core import parallel_state
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

# Of the steps before in the mean reward that KTO and the quality term compare with: one step's pairs are few.
KEPT = 0.9
# What a step reports, in the field's names: means over its pairs; of the chosen answers' tokens for the last.
NUMBERS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss")


def answer_positions(batch: Batch) -> torch.Tensor:
    """bool [A, S]: which positions of the row are of each answer's segment."""
    assert batch.cu_seqlens is not None, "pairs are packed"
    bounds = batch.cu_seqlens[: 2 * len(batch.pairs) + 1].cpu()
    places_S = torch.arange(batch.labels_BS.shape[1])
    return platform.on_device((bounds[:-1, None] <= places_S) & (places_S < bounds[1:, None]))


def answer_log_probs(losses_BL: torch.Tensor, answers_AS: torch.Tensor) -> torch.Tensor:
    """[P, 2]: log-probability of each answer, summed over its tokens, from the losses of this rank's positions.

    Collective under context parallelism; each rank's gradient is that of its own positions.
    """
    sums_A = -(share(answers_AS) * losses_BL).sum(dim=1)
    if parallel.context_parallel_size() > 1:
        sums_A = reduce_from_tensor_model_parallel_region(sums_A, parallel_state.get_context_parallel_group())
    return sums_A.view(-1, 2)


def answer_lengths(batch: Batch, answers_AS: torch.Tensor) -> torch.Tensor:
    """[P, 2]: tokens of each answer."""
    return (answers_AS & (batch.labels_BS != IGNORE_INDEX)).sum(dim=1).view(-1, 2)


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of one step's micro-batches."""

    options: PreferenceConfig
    counts: Counts  # of the global batch
    scale: float  # Megatron-Core averages over micro-batches and ranks: their number
    shift: float  # mean reward of the steps before
    names: ClassVar[tuple[str, ...]] = NUMBERS
    inputs: ClassVar[dict] = {}  # of the model, beside the batch's: none

    def __call__(self, losses_BL: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss for the schedule, fp32 [NUMBERS] of which the sum over micro-batches and ranks is the step's)."""
        options, answers_AS = self.options, answer_positions(batch)
        policy_P2, lengths_P2 = answer_log_probs(losses_BL, answers_AS), answer_lengths(batch, answers_AS)
        assert batch.reference_P2 is not None, "stage 4 reads the reference's log-probabilities with its rows"
        ratios_P2 = policy_P2 - batch.reference_P2
        arguments = ratios_P2, lengths_P2, options.beta, self.shift
        pair_P = options.loss_coeff * LOSSES[options.loss](*arguments)
        if options.quality_coeff:
            pair_P = pair_P + options.quality_coeff * quality(*arguments)
        of_pair, of_token = 1 / max(self.counts.pairs, 1), 1 / max(self.counts.chosen_tokens, 1)
        nll = -policy_P2[:, 0].sum() * of_token
        loss = pair_P.sum() * of_pair + options.sft_coeff * nll
        rewards_P2 = options.beta * ratios_P2.detach()
        margins_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        sums = [*rewards_P2.sum(dim=0), (margins_P > 0).sum(), margins_P.sum()]
        numbers = torch.stack([loss.detach(), *(value * of_pair for value in sums), nll.detach()])
        # Context-parallel ranks know the same numbers, and the log adds them up.
        return loss * self.scale, numbers / parallel.context_parallel_size()


def next_shift(shift: float, numbers: dict[str, float]) -> float:
    """The mean reward of both answers, over the steps so far, the later ones counting more."""
    return KEPT * shift + (1 - KEPT) * (numbers["rewards/chosen"] + numbers["rewards/rejected"]) / 2
