"""The command line of evaluation."""

import json
import subprocess
import sys

import pytest

from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.paths import REPO


def command(*arguments, cwd=REPO):
    return subprocess.run(
        [sys.executable, str(REPO / "tools" / "evaluate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(REPO), "PATH": ""},
        timeout=120,
    )


def test_score_only_scores_a_file_of_the_original_and_collects_the_table(tmp_path):
    miniatures.textvqa(tmp_path)
    miniatures.gqa(tmp_path)
    # TextVQA's rows of one picture share an id: without a round, they count in the file's order.
    rows = [("i1", "2 dogs"), ("i1", "Acme"), ("i2", "exit")]
    miniatures.write_jsonl(tmp_path / "text.jsonl", [{"question_id": id_, "text": text} for id_, text in rows])
    miniatures.write_jsonl(tmp_path / "gqa.jsonl", [{"question_id": f"a{n}", "text": "yes"} for n in (1, 2, 3)])
    shared = ("--data", tmp_path, "--out", tmp_path / "out", "--model-name", "released", "--bootstrap", 20)
    assert command("--benchmark", "gqa", "--score-only", tmp_path / "gqa.jsonl", *shared).returncode == 0
    result = command("--benchmark", "textvqa", "--score-only", tmp_path / "text.jsonl", *shared)
    assert result.returncode == 0, result.stderr
    assert "73.3 ±" in result.stdout
    assert "33.3 ±" in result.stdout  # the benchmark before stays in the table
    assert (tmp_path / "out" / "table.md").read_text() in result.stdout
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [record["title"] for record in scores] == ["GQA", "TextVQA"]


def test_score_only_needs_no_pictures_and_names_missing_answers(tmp_path):
    folder = miniatures.gqa(tmp_path)
    for path in (folder / "data/images").iterdir():
        path.unlink()
    (folder / "data/images").rmdir()
    miniatures.write_jsonl(tmp_path / "gqa.jsonl", [{"question_id": "a1", "text": "yes"}])
    result = command(
        "--benchmark", "gqa", "--score-only", tmp_path / "gqa.jsonl", "--data", tmp_path, "--out", tmp_path / "o"
    )
    assert result.returncode == 2
    assert "lacks 2 of 3 answers, first question a2" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "popo", "--score-only", "x"], "benchmark='popo' is unknown; use pope"),
        (["--score-only", "x"], "benchmark is empty"),
        (["--benchmark", "pope", "--score-only", "x", "--limit", "-1"], "limit=-1"),
        (["--benchmark", "pope", "--score-only", "x", "--judge-url", "http://h/v1"], "give both or neither"),
        (["--benchmark", "pope", "--score-only", "x", "--data", "nowhere"], "<- missing"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message):
    result = command(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
