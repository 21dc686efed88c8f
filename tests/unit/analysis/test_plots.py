"""The picture of expert load."""

import numpy as np

from megatron_moellava.analysis.plots import plot_expert_load


def test_every_bar_is_all_of_its_layers_choices(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    counts_LME = np.zeros((4, 2, 3), dtype=np.int64)
    counts_LME[1], counts_LME[3] = [[6, 2, 2], [5, 5, 0]], [[1, 1, 1], [0, 0, 9]]
    plot_expert_load(counts_LME, (1, 3), tmp_path / "load.png", "load")
    text, image = plt.gcf().axes
    heights = np.array([bar.get_height() for bar in text.patches]).reshape(3, 2)
    assert np.allclose(heights.sum(axis=0), 1.0) and np.allclose(heights[:, 0], [0.6, 0.2, 0.2])
    assert [label.get_text() for label in text.get_xticklabels()] == ["1", "3"]
    assert image.get_title() == "image tokens (19 choices)"
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.undo()
    plt.close("all")


def test_a_layer_without_a_token_of_a_kind_has_no_bar(tmp_path):
    plot_expert_load(np.zeros((1, 2, 2), dtype=np.int64), (0,), tmp_path / "load.png", "load")
    assert (tmp_path / "load.png").exists()
