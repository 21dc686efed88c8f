"""What a pair of answers, chosen and rejected, costs: one table of pure functions.

`ratios_P2`: log-probability of each answer under the policy minus that under the reference, summed over its tokens, of P
pairs, chosen first. `lengths_P2`: their tokens, the end among them. `shift`: the mean reward of answers in the steps
before (`training/preference.py`), in units of beta times a ratio. Every function returns [P].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

PairLoss = Callable[[torch.Tensor, torch.Tensor, float, float], torch.Tensor]


def dpo(ratios_P2: torch.Tensor, lengths_P2: torch.Tensor, beta: float, shift: float) -> torch.Tensor:
    """Rafailov et al. (arXiv 2305.18290), equation 7."""
    return -F.logsigmoid(beta * (ratios_P2[:, 0] - ratios_P2[:, 1]))


def ipo(ratios_P2: torch.Tensor, lengths_P2: torch.Tensor, beta: float, shift: float) -> torch.Tensor:
    """Azar et al. (arXiv 2310.12036), equation 17, whose tau is beta; of means over tokens, as its authors computed it."""
    means_P2 = ratios_P2 / lengths_P2.clamp(min=1)
    return (means_P2[:, 0] - means_P2[:, 1] - 1 / (2 * beta)) ** 2


def kto(ratios_P2: torch.Tensor, lengths_P2: torch.Tensor, beta: float, shift: float) -> torch.Tensor:
    """Ethayarajh et al. (arXiv 2402.01306), equation 8, with both weights 1: the mean over the two answers.

    Its baseline, the divergence from the reference, is `shift` where that is positive.
    """
    baseline = max(shift, 0.0)
    chosen_P = 1 - torch.sigmoid(beta * ratios_P2[:, 0] - baseline)
    rejected_P = 1 - torch.sigmoid(baseline - beta * ratios_P2[:, 1])
    return (chosen_P + rejected_P) / 2


def quality(ratios_P2: torch.Tensor, lengths_P2: torch.Tensor, beta: float, shift: float) -> torch.Tensor:
    """MPO's quality term (arXiv 2411.10442), which is BCO (arXiv 2404.04656): each answer is judged by itself."""
    chosen_P = -F.logsigmoid(beta * ratios_P2[:, 0] - shift)
    return chosen_P - F.logsigmoid(shift - beta * ratios_P2[:, 1])


LOSSES: dict[str, PairLoss] = {"dpo": dpo, "ipo": ipo, "kto": kto}  # values of preference.loss
