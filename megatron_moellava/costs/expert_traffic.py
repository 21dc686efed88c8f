"""What experts by modality make of expert parallelism: tokens of the busiest rank, and rows that leave a rank.

All is expected of routers that spread each modality evenly over the experts that it can choose among, K different ones for a
token, with the tokens evenly over the ranks. A rank holds E / ranks neighbours. With a penalty instead of -inf a router may
choose as if there were no groups, and is counted so.
"""

from math import comb

from megatron_moellava.config import MoEConfig
from megatron_moellava.routers import admissible_experts


def busiest_rank(moe: MoEConfig, ranks: int, image_share: float) -> float:
    """Choices of the busiest expert-parallel rank over the mean.

    >>> busiest_rank(MoEConfig(expert_groups=ExpertGroups(image=2, text=2)), 2, 0.8)
    1.6
    """
    return ranks * max(
        sum(share * held[rank] / sum(held) for share, held in _modalities(moe, ranks, image_share))
        for rank in range(ranks)
    )


def rows_to_others(moe: MoEConfig, ranks: int) -> float:
    """Rows that a token sends to other ranks where each choice is a row of its own, as in an all-to-all of permuted tokens:
    groups change nothing, because the token is as likely to be anywhere."""
    return moe.moe_router_topk * (1 - 1 / ranks)


def copies_to_others(moe: MoEConfig, ranks: int, image_share: float) -> float:
    """Rows that a token sends to other ranks where a rank gets one copy for all its experts, as DeepEP does.

    Four experts on two ranks, K=2: both ranks but for 2 of 6 pairs, so 5/3 x 1/2; where the pair is always on one rank 1/2.
    """
    reached = sum(
        share
        * sum(1 - comb(sum(held) - here, moe.moe_router_topk) / comb(sum(held), moe.moe_router_topk) for here in held)
        for share, held in _modalities(moe, ranks, image_share)
    )
    return reached * (1 - 1 / ranks)


def _modalities(moe: MoEConfig, ranks: int, image_share: float) -> list[tuple[float, list[int]]]:
    """Of text and of image tokens: (their share, how many of their experts each rank holds)."""
    size, found = moe.num_moe_experts // ranks, []
    for share, experts in zip((1 - image_share, image_share), admissible_experts(moe), strict=True):
        found.append((share, [sum(expert // size == rank for expert in experts) for rank in range(ranks)]))
    return found
