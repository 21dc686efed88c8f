"""What the seeds of a grid say: paired differences, and claims of the paper."""

import json
import statistics

import pytest

from megatron_moellava.experiments.results import collect, compare, holm, summarise, verdict, write_results
from megatron_moellava.experiments.tables import claims_table, plot
from tests.helpers.grids import GRID, made, rows_of


def test_paired_test_sees_what_unpaired_noise_hides():
    base, better = {1: 60.0, 2: 70.0, 3: 80.0}, {1: 61.0, 2: 71.1, 3: 80.9}
    result = compare("base", better, base)
    assert result.mean == pytest.approx(1.0)
    assert result.deviation == pytest.approx(0.1)
    assert result.p == pytest.approx(0.0033, abs=1e-4)  # t = 17.3 with 2 degrees of freedom
    assert statistics.stdev(base.values()) > 5


def test_missing_seeds_are_left_out_of_the_pairs():
    assert compare("base", {1: 1.0, 2: 5.0}, {2: 4.0, 3: 1.0}).seeds == 1
    assert compare("base", {1: 1.0}, {1: 1.0}).p is None
    assert compare("base", {1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p is None


def test_results_are_collected_from_the_nodes_and_drawn(grid, tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2):
        node = grid.chain("four", seed)[-1]
        (runs / node.name).mkdir(parents=True)
        (runs / node.name / "done.json").write_text(json.dumps({"numbers": {"accuracy": 60.0 + seed}}))
    rows = collect(grid, runs)
    write_results(runs / "grid", rows)
    assert [row["seed"] for row in map(json.loads, (runs / "grid/results.jsonl").open())] == [1, 2]
    assert summarise(grid, rows, "accuracy")[0].mean == 61.5
    plot(grid, rows, runs / "plot.png")
    assert (runs / "plot.png").stat().st_size > 2000


@pytest.mark.parametrize(("four", "two", "words"), [
    ([60.0, 61.0, 62.0], [59.0, 60.1, 61.2], "held"),
    ([59.0, 60.1, 61.2], [60.0, 61.0, 62.0], "the reverse"),
    ([60.0, 61.0, 62.0], [61.0, 60.0, 62.1], "not told from noise (other direction)"),
    ([60.0, 61.0, 62.0], [59.0, 61.0, 61.9], "not told from noise (same direction)"),
    ([60.0, 61.0, 62.0], [60.0, 61.0, 62.0], "equal in every seed"),
])  # fmt: skip
def test_a_claim_of_the_paper_gets_a_verdict(grid, four, two, words):
    rows = rows_of(grid, {"four": four, "two": two})
    assert verdict(grid, rows, grid.claims[0])[1] == words
    text = claims_table([(grid, rows)])
    assert f"| four rather than two | **{words}** | accuracy |" in text
    assert f"Of 1 findings {int(words == 'held')} held here, {int(words == 'the reverse')} came out" in text


def test_lower_losses_are_better(grid, tmp_path):
    by_loss = made(tmp_path, GRID + "metrics: [held_out_loss]\n")
    rows = [{**row, "held_out_loss": row["accuracy"]} for row in rows_of(grid, {"four": [1, 2, 3], "two": [2, 3.1, 4]})]
    assert verdict(by_loss, rows, grid.claims[0])[1] == "held"
    assert verdict(by_loss, rows[:3], grid.claims[0]) is None, "a cell is missing"


def test_many_tests_are_corrected_by_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
