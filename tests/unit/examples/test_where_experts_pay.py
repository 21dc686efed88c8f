"""The page "where experts pay" is made of the data beside it, and of nothing else."""

import pytest

from megatron_moellava.experiments.grid import load_grid
from tests.helpers.paths import REPO


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples/ablations"))
    import where_experts_pay

    return where_experts_pay


def test_the_page_is_what_the_data_give(program):
    grids = [load_grid(program.HERE / f"{name}.yaml") for name in program.GRIDS]
    rows = program.read_data(program.DOCS / program.DATA)
    assert rows and (program.DOCS / program.PAGE).read_text() == program.page(grids, rows)
    cells = {grid.name: set(grid.cells) for grid in grids}
    assert all(row["cell"] in cells[row["grid"]] and row["bits_per_fact"] > 0 for row in rows)


def test_a_curve_is_the_means_of_equal_stretches(program):
    assert program.binned([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert program.binned([1.0, 3.0], 30) == [1.0, 3.0]
    assert program.binned([]) == []


def test_a_run_made_again_replaces_its_row(program):
    old = [{"grid": "a", "cell": "b", "seed": 2, "bits_per_fact": 1.0}, {"grid": "a", "cell": "b", "seed": 1}]
    new = [{"grid": "a", "cell": "b", "seed": 2, "bits_per_fact": 2.0}]
    assert program.merged(old, new) == [old[1], new[0]]
