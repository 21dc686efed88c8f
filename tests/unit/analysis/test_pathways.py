"""Pathways and co-activation of imagined tokens."""

import numpy as np
import pytest

from megatron_moellava.analysis.pathways import coactivation, frequent_pathways, principal_pathways


def test_frequent_pathways_are_the_ones_that_occur():
    first_TL = np.array([[0, 1], [2, 1], [0, 1], [0, 1], [3, -1]])
    found = frequent_pathways(first_TL, most=1)
    assert found.experts_PL.tolist() == [[0, 1]]
    assert found.counts_P.tolist() == [3]
    assert (found.tokens, found.distinct) == (4, 2)  # the token with a dropped choice has no pathway
    assert found.shares() == pytest.approx([0.75])
    assert frequent_pathways(np.full((3, 2), -1)).tokens == 0


def test_principal_pathways_are_the_originals():
    """Scores of scikit-learn's PCA over layers, scaled, clipped and quantised (specification of the original's figure 6)."""
    from sklearn.decomposition import PCA

    first_TL = np.random.default_rng(0).integers(0, 4, (50, 14))
    scores_LP = PCA(n_components=12, svd_solver="full").fit_transform(first_TL.T)
    scaled = (scores_LP - scores_LP.min(0)) / (scores_LP.max(0) - scores_LP.min(0))
    expected = (scaled.clip(0.01, 0.99) * 4).astype(int).T
    assert np.array_equal(principal_pathways(first_TL, 4), expected)
    assert principal_pathways(first_TL[:, :3], 4).shape == (3, 3)  # the original fails with fewer than 12 layers


def test_coactivation_counts_pairs_of_one_token():
    choices_TLK = np.array([[[0, 1]], [[1, 2]], [[1, -1]]], dtype=np.int16)
    expected = np.array([[1, 1, 0], [1, 3, 1], [0, 1, 1]]) / 3
    assert coactivation(choices_TLK, 3)[0] == pytest.approx(expected)
