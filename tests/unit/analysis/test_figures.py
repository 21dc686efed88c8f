"""Figures of the analysis."""

import numpy as np

from megatron_moellava.analysis.figures import modality_preference, plt, spread, token_grid


def test_visual_tokens_become_a_square():
    assert token_grid(np.arange(9)).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert token_grid(np.arange(8))[0].tolist() == [-1, 0, 1]  # SigLIP without its first patch
    assert spread(5, 3) == [0, 2, 4]


def test_an_experts_tokens_are_shared_out_among_all_modalities():
    """Two layers; the first modality goes to expert 0, the second to both, the third to expert 1."""
    choices_MLE = np.array([[[4, 0], [4, 0]], [[5, 5], [0, 0]], [[0, 9], [0, 9]]])
    figure = modality_preference(choices_MLE, (0, 2), ("text", "image", "depth"))
    heights = np.array([bar.get_height() for bar in figure.axes[0].patches]).reshape(3, 2)
    assert np.allclose(heights, [[2 / 3, 1], [1 / 3, 0], [0, 0]])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["text", "image", "depth"]
    plt.close(figure)
