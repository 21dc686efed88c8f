"""What the seeds of a grid say: paired differences, and claims of the paper."""

import json
import statistics

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.experiments.results import (
    collect,
    compare,
    holm,
    judge,
    summarise,
    with_kept,
    write_results,
    write_rows,
)
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


@pytest.mark.parametrize(("four", "two", "word"), [
    ([60.0, 61.0, 62.0], [59.0, 60.1, 61.2], "held"),
    ([59.0, 60.1, 61.2], [60.0, 61.0, 62.0], "the reverse"),
    ([60.0, 61.0, 62.0], [61.0, 60.0, 62.1], "not told from noise (other direction)"),
    ([60.0, 61.0, 62.0], [59.0, 61.0, 61.9], "not told from noise (same direction)"),
    ([60.0, 61.0, 62.0], [60.0, 61.0, 62.0], "equal in every seed"),
])  # fmt: skip
def test_a_claim_of_the_paper_is_judged(grid, four, two, word):
    rows = rows_of(grid, {"four": four, "two": two})
    (judged,) = judge([(grid, rows)])
    assert word.startswith(judged.word) and judged.p == judged.comparison.p
    text = claims_table([(grid, rows)])
    assert f"| four rather than two | **{word}** | accuracy |" in text
    assert f"Of 1 findings {int(word == 'held')} held here, {int(word == 'the reverse')} came out" in text


def test_lower_losses_are_better(grid, tmp_path):
    by_loss = made(tmp_path, GRID + "metrics: [held_out_loss]\n")
    rows = [{**row, "held_out_loss": row["accuracy"]} for row in rows_of(grid, {"four": [1, 2, 3], "two": [2, 3.1, 4]})]
    assert [item.word for item in judge([(by_loss, rows)])] == ["held"]
    assert judge([(by_loss, rows[:3])]) == [], "a cell is missing"


def test_claims_are_corrected_together(grid):
    clear = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [59.0, 60.1, 61.2]})
    doubtful = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [59.0, 60.5, 61.3]})
    (alone,) = judge([(grid, doubtful)])
    assert alone.word == "held" and alone.p == alone.comparison.p < 0.05
    first, second = judge([(grid, clear), (grid, doubtful)])
    assert (first.p, second.p) == pytest.approx((2 * first.comparison.p, alone.p))
    third, *_ = judge([(grid, doubtful)] * 3)
    assert third.word == "not told from noise" and third.p == pytest.approx(3 * alone.p)


def test_a_run_made_again_replaces_its_row_and_the_others_stay(tmp_path):
    old = [{"grid": "a", "cell": "b", "seed": 2, "bits": 1.0}, {"grid": "a", "cell": "b", "seed": 1, "bits": 3.0}]
    write_rows(tmp_path / "data.jsonl", old)
    new = old[0] | {"bits": 2.0}
    assert with_kept([new], tmp_path / "data.jsonl") == [old[1], new]
    assert with_kept([new], tmp_path / "none.jsonl") == [new]


@pytest.mark.parametrize("text", ["{", "[]", '{"grid": "a", "cell": "b"}'])
def test_a_file_of_something_else_is_no_file_of_results(tmp_path, text):
    (tmp_path / "data.jsonl").write_text(text + "\n")
    with pytest.raises(ConfigError, match=r"data\.jsonl should have one result a line"):
        with_kept([], tmp_path / "data.jsonl")


def test_many_tests_are_corrected_by_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
