"""The picture of the best plans."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.costs.gpus import GPUS
from megatron_moellava.planning.picture import draw, label
from tests.helpers.planning import found_for, layout_of


def test_a_label_says_what_divides_the_model():
    assert label(layout_of(8)) == "TP1 PP1 EP1 DP8 mb1 recompute=none"
    interleaved = {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2}
    assert label(layout_of(8, **interleaved)) == "TP1 PP2v2 EP1 DP4 mb1 recompute=none"
    by_cost = {"parallel__pipeline_model_parallel_size": 2, "parallel__pipeline_split": "cost"}
    assert "PP2 by cost" in label(layout_of(8, **by_cost))


def test_plans_are_drawn_with_the_limit_and_a_warning(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    plans = found_for().plans[:3]
    draw(plans, GPUS["h100"].memory, "phi-2", tmp_path / "plan.png")
    memory, _ = plt.gcf().axes
    assert [text.get_text() for text in memory.get_yticklabels()] == [label(plan.layout) for plan in plans]
    assert "predicted, never measured on a GPU" in plt.gcf().get_suptitle()
    totals = [0.0] * len(plans)
    for bar in memory.patches:
        totals[round(bar.get_y() + 0.3)] += bar.get_width() * 2**30
    assert all(abs(total / plan.memory.total - 1) < 1e-6 for total, plan in zip(totals, plans, strict=True))
    assert (tmp_path / "plan.png").stat().st_size > 2000
    with pytest.raises(ConfigError, match=r"--picture .*plan\.doc: Format 'doc' is not supported"):
        draw(plans, GPUS["h100"].memory, "phi-2", tmp_path / "plan.doc")
    monkeypatch.undo()
    plt.close("all")
