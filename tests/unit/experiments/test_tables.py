"""Tables, sentences and plots of a grid say only what was run."""

import json

from megatron_moellava.experiments.tables import findings, paper_table, plot, plot_curves, report, table
from tests.helpers.grids import GRID, made, rows_of


def test_table_has_only_what_was_run(grid):
    rows = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [59.0, 60.1, 61.2]})
    text = table(grid, rows)
    assert "| **four** | 3 | 61.00 ± 1.00 |" in text
    assert "| two | 3 | 60.10 ± 1.10 | -0.90 ± 0.10 | 0.004 | 0.5000 |" in text
    assert "slow" not in text and "diverged" not in text
    (sentence,) = findings(grid, rows)
    assert "beyond the noise, p = 0.004" in sentence
    assert "| four | 61.5 |" in paper_table(grid) and "| two |  |" in paper_table(grid)
    assert "## grid" in report(grid, rows, "plot.png")


def test_a_small_effect_is_called_noise(grid):
    rows = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [61.0, 60.0, 62.1]})
    assert "cannot" not in findings(grid, rows)[0] and "no difference" in findings(grid, rows)[0]


def test_other_metrics_are_spoken_of_when_they_differ(tmp_path):
    grid = made(tmp_path, GRID + "metrics: [accuracy, max_load]\n")
    rows = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [61.0, 60.0, 62.1]})
    for row, load in zip(rows, [1.1, 1.2, 1.3, 1.6, 1.7, 1.81], strict=True):
        row["max_load"] = load
    accuracy, load = findings(grid, rows)
    assert "accuracy" in accuracy and "no difference" in accuracy
    assert "max_load +0.50" in load and "beyond the noise" in load


def test_a_cell_has_one_place_in_every_panel_also_where_it_lacks_a_metric(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    grid = made(tmp_path, GRID + "metrics: [accuracy, max_load]\n")
    rows = rows_of(grid, {"four": [60.0, 61.0], "two": [61.0, 60.0]})
    for row in rows[2:]:
        row["max_load"] = 1.5
    plot(grid, rows, tmp_path / "plot.png")
    panels = plt.gcf().axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["four", "two"]
    for panel in panels:
        places = [place for line in panel.lines for place in line.get_ydata() if line.get_marker() == "."]
        assert all(-0.5 < place < 1.5 for place in places) and panel.get_ylim() == (1.5, -0.5)
    assert set(places) == {1.18}, "the load is that of the second cell"
    monkeypatch.undo()
    plt.close("all")


def test_a_misspelt_metric_is_named_with_those_that_there_are(tmp_path):
    grid = made(tmp_path, GRID + "metrics: [accuracy, acuracy]\n")
    text = report(grid, rows_of(grid, {"four": [60.0, 61.0], "two": [61.0, 60.0]}))
    assert "No finished run has acuracy. `metrics` can be: accuracy, final_loss." in text
    known = made(tmp_path, GRID)
    assert "No finished run" not in report(known, rows_of(known, {"four": [60.0]}))


def test_curves_have_a_panel_for_each_cell_with_the_baseline_behind(grid, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    rows = [row | {"node": f"{row['cell']}-{row['seed']}"} for row in rows_of(grid, {"four": [1, 2], "two": [3, 4]})]
    for row in rows:
        (tmp_path / row["node"]).mkdir()
        lines = [{"iteration": step, "loss": row["accuracy"] / step} for step in (1, 2, 3)]
        (tmp_path / row["node"] / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(grid, rows, tmp_path, tmp_path / "curves.png")
    shown = [panel for panel in plt.gcf().axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown] == ["four", "two"]
    assert [next(iter(line.get_ydata())) for line in shown[1].lines] == [1, 2, 3, 4]
    assert (tmp_path / "curves.png").stat().st_size > 2000
    monkeypatch.undo()
    plt.close("all")
