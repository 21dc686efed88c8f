"""Figures of the analysis."""

import numpy as np

from megatron_moellava.analysis.figures import spread, token_grid


def test_visual_tokens_become_a_square():
    assert token_grid(np.arange(9)).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert token_grid(np.arange(8))[0].tolist() == [-1, 0, 1]  # SigLIP without its first patch
    assert spread(5, 3) == [0, 2, 4]
