"""What the pages of measurements have in common."""

import json
from argparse import Namespace

import pytest

PROGRAM = "pages"
OLD = [{"grid": "a", "cell": "b", "seed": 2, "bits_per_fact": 1.0}, {"grid": "a", "cell": "b", "seed": 1}]
NEW = {"grid": "a", "cell": "b", "seed": 2, "bits_per_fact": 2.0}


def test_a_curve_is_the_means_of_equal_stretches(program):
    assert program.binned([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert program.binned([1.0, 3.0], 30) == [1.0, 3.0]
    assert program.binned([]) == []


@pytest.mark.parametrize("has_runs", [True, False])
def test_what_is_finished_is_taken_into_the_data_where_runs_are_named(program, tmp_path, has_runs):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OLD))
    options = Namespace(docs=tmp_path, runs=tmp_path / "runs" if has_runs else None)
    rows = program.rows_of(options, "data.jsonl", lambda runs: [NEW | {"runs": runs.name}])
    assert rows == [OLD[1], NEW | {"runs": "runs"} if has_runs else OLD[0]]
    assert [json.loads(line) for line in (tmp_path / "data.jsonl").open()] == (rows if has_runs else OLD)


def test_numbers_as_pages_write_them(program):
    assert program.signed(-1.2, 0.1) == "-1.20 ± 0.10" and program.signed(3.0, None) == "+3.00"
    assert program.chance(0.0123) == "= 0.0123" and program.chance(1e-5) == "< 0.0001"
