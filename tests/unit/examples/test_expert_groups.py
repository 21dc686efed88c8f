"""The page "routing by modality" is made of its data and of what is predicted, and of nothing else."""

import pytest

from megatron_moellava.experiments.grid import load_grid
from tests.helpers.paths import REPO


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples/ablations"))
    import expert_groups

    return expert_groups


def test_the_page_is_what_the_data_give(program):
    grid = load_grid(program.HERE / "expert_groups.yaml")
    rows = program.read_data(program.DOCS / program.DATA)
    assert (program.DOCS / program.PAGE).read_text() == program.page(grid, rows)
    assert {row["cell"] for row in rows} <= set(grid.cells)


def test_a_run_is_a_line_with_its_difference_and_a_dot_with_what_it_saves(program, tmp_path):
    grid = load_grid(program.HERE / "expert_groups.yaml")
    rows = [
        {
            "cell": cell,
            "seed": seed,
            "held_out_loss": 0.5 + lost + 0.01 * seed * (1 + lost),
            "image_share": 0.75,
            "counted": [{"rows": 1.0, "copies": copies, "busiest": busiest} for copies in (0.8, 1.4, 1.75)],
        }
        for cell, lost, busiest in (("all", 0.0, 1.0), ("halves", 0.1, 1.5))
        for seed in (1, 2, 3)
        for copies in (0.8,)
    ]
    for row in rows[3:]:
        row["counted"][0]["copies"] = 0.5
    assert program.saved(rows, rows[4], 0, "all") == pytest.approx(1 - 0.5 / 0.8)
    line = next(line for line in program.table(grid, rows).splitlines() if line.startswith("| halves |"))
    assert "| 3 | 0.6220 ± 0.0110 | +0.1020 ± 0.0010 | 0.00 | 0.50 / 0.50 | 1.50 / 1.50 |" in line
    program.draw(grid, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
