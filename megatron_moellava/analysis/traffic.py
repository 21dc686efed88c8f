"""What the routes of a data set send under expert parallelism, and how level the ranks are: counted, for any number of ranks.

A rank holds E / ranks neighbours; a token is on any rank alike, so that of what reaches a rank 1 / ranks stays. Shapes: T
tokens, L MoE layers, K choices, E experts.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Traffic:
    """Means over tokens and MoE layers, for expert-parallel ranks."""

    ranks: int
    rows: float  # a token sends to other ranks, each choice its own row (all-to-all of permuted tokens)
    copies: float  # likewise, a rank getting one copy for all its experts (DeepEP)
    busiest: float  # tokens of the busiest rank over the mean, mean over layers
    wait_share: float  # of the experts' time in which the mean rank waits for the busiest


def traffic(choices_TLK: np.ndarray, num_experts: int, ranks: int) -> Traffic:
    """`choices`: experts, negative where a choice was dropped.

    Choices (0, 1) and (1, 2) of two tokens, four experts on two ranks: rows 1.0, copies (1 + 2) / 2 x 1/2 = 0.75, busiest
    3 / 2.
    """
    size = num_experts // ranks
    rank_TLK = np.where(choices_TLK < 0, -1, choices_TLK // size)
    chosen_RTLK = rank_TLK == np.arange(ranks)[:, None, None, None]
    loads_RL = chosen_RTLK.sum(axis=(1, 3)).astype(float)
    reached = chosen_RTLK.any(axis=3).sum(axis=0).mean()
    away, busiest_L, mean_L = 1 - 1 / ranks, loads_RL.max(axis=0), loads_RL.mean(axis=0)
    return Traffic(
        ranks=ranks,
        rows=float((rank_TLK >= 0).sum(axis=2).mean() * away),
        copies=float(reached * away),
        busiest=float((busiest_L / mean_L).mean()),
        wait_share=float(1 - mean_L.sum() / busiest_L.sum()),
    )


def divisions(num_experts: int, most: int = 8) -> list[int]:
    """Numbers of ranks that experts can be divided over, 2 to `most`."""
    return [ranks for ranks in range(2, most + 1) if num_experts % ranks == 0]
