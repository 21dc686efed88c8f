"""Token pathways: the expert that a token prefers in each MoE layer, one after the other.

Two views: how often each pathway really occurs, and the original's picture, whose lines are quantised principal
components and need not be the way of any token. Shapes: T tokens, L MoE layers, E experts, P pathways.
"""

from dataclasses import dataclass

import numpy as np

COMPONENTS = 12  # the original's


@dataclass(frozen=True, slots=True)
class Pathways:
    """The P most frequent pathways of a set of tokens, and how many of each there are."""

    experts_PL: np.ndarray  # most frequent first
    counts_P: np.ndarray
    tokens: int  # with a choice in every layer
    distinct: int

    def shares(self) -> np.ndarray:
        """Share of all counted tokens that each pathway has, [P]."""
        return self.counts_P / max(self.tokens, 1)


def frequent_pathways(first_TL: np.ndarray, most: int = 10) -> Pathways:
    """The pathways that occur most often, ties in the order of the experts.

    >>> frequent_pathways([[0, 1], [2, 1], [0, 1]]) -> experts [[0, 1], [2, 1]], counts [2, 1]
    """
    whole_TL = first_TL[(first_TL >= 0).all(axis=1)]
    if not len(whole_TL):
        return Pathways(np.zeros((0, first_TL.shape[1]), dtype=np.int16), np.zeros(0, dtype=np.int64), 0, 0)
    experts_PL, counts_P = np.unique(whole_TL, axis=0, return_counts=True)
    order = np.argsort(-counts_P, kind="stable")[:most]
    return Pathways(experts_PL[order], counts_P[order], len(whole_TL), len(experts_PL))


def principal_pathways(first_TL: np.ndarray, num_experts: int, components: int = COMPONENTS) -> np.ndarray:
    """[P, L] as the original draws them: principal components of the layers, quantised to expert numbers.

    PCA of the matrix layers x tokens; the scores of each component are scaled to 0..1 over the layers, clipped to 0.01
    .. 0.99 and cut into E equal bins. Fewer layers than components give as many as there are.
    """
    centred_LT = first_TL.T.astype(np.float64)
    centred_LT = centred_LT - centred_LT.mean(axis=0)
    left_LP, sizes_P, right_PT = np.linalg.svd(centred_LT, full_matrices=False)
    largest = np.abs(right_PT).argmax(axis=1)  # a sign is free: the largest loading is positive, as scikit-learn has it
    signs_P = np.sign(right_PT[np.arange(len(right_PT)), largest])
    scores_LP = (left_LP * sizes_P * signs_P)[:, : min(components, *centred_LT.shape)]
    low, high = scores_LP.min(axis=0), scores_LP.max(axis=0)
    scaled_LP = ((scores_LP - low) / np.where(high > low, high - low, 1.0)).clip(0.01, 0.99)
    return (scaled_LP * num_experts).astype(np.int64).T


def coactivation(choices_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, E, E]: share of a layer's tokens that go to both experts; the diagonal: to this one at all."""
    tokens, layers, _ = choices_TLK.shape
    pairs_LEE = np.zeros((layers, num_experts, num_experts))
    for layer in range(layers):
        chosen_TE = np.zeros((tokens, num_experts + 1))
        np.put_along_axis(chosen_TE, choices_TLK[:, layer].astype(np.int64) % (num_experts + 1), 1.0, axis=1)
        chosen_TE = chosen_TE[:, :num_experts]  # the last column took what was dropped
        pairs_LEE[layer] = chosen_TE.T @ chosen_TE / max(tokens, 1)
    return pairs_LEE
