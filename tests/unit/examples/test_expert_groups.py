"""The page "routing by modality" is made of its data and of what is predicted, and of nothing else."""

import statistics

import pytest

PROGRAM, GRID = "expert_groups", "expert_groups"


def test_the_page_is_what_the_data_give(program, grid, rows, written):
    assert written == program.page(grid, rows)
    assert {row["cell"] for row in rows} <= set(grid.cells)


def test_what_the_page_says_is_true_of_the_data(program, rows):

    def of(cell):
        return {row["seed"]: row for row in rows if row["cell"] == cell}

    def saved(cell, number):
        return [program.saved(rows, row, number, "all") for row in of(cell).values()]

    def lost(cell):
        return [row[program.METRIC] - of("all")[seed][program.METRIC] for seed, row in of(cell).items()]

    def level(cell, number):
        return statistics.fmean(row["counted"][number]["busiest"] for row in of(cell).values())

    assert min(saved("halves", 0)) > 1 / 3 and statistics.fmean(saved("halves", 1)) == pytest.approx(1 / 7, abs=0.01)
    plain = statistics.fmean(row[program.METRIC] for row in of("all").values())
    assert min(lost("halves")) > 0 and statistics.fmean(lost("halves")) / plain == pytest.approx(0.005, abs=5e-4)
    assert statistics.fmean(saved("in-proportion", 0)) == pytest.approx(
        statistics.fmean(saved("halves", 0)) / 2, abs=0.03
    )
    assert statistics.fmean(saved("in-proportion", 1)) > statistics.fmean(saved("halves", 1))
    assert all(level("in-proportion", number) < level("all", number) for number in (0, 1, 2))
    assert min(lost("in-proportion")) < 0 < max(lost("in-proportion"))
    assert all(abs(statistics.fmean(saved("halves-softly", number))) < 0.02 for number in (0, 1))
    assert all(
        share == 0 for cell in ("halves", "halves-softly", "shared", "in-proportion") for share in saved(cell, 2)
    )


def test_a_run_is_a_line_with_its_difference_and_a_dot_with_what_it_saves(program, grid, tmp_path):
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
