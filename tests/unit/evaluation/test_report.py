"""Submission files, the table beside the paper's rows, and the command line."""

import json
import subprocess
import sys
import time

import openpyxl
import pytest

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.published import COLUMNS, PUBLISHED
from megatron_moellava.evaluation.report import format_table
from megatron_moellava.evaluation.tasks import TASKS, get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.paths import REPO

ROOT = REPO


def submit(name, data, texts, circular=False):
    task = get_task(name)
    questions = task.read(data, circular=circular)
    answered = Answered(folder=data / task.folder, work=data / "work", name="ours", questions=questions, texts=texts)
    return task.submit(answered)


def test_vqav2_submission_covers_the_whole_test_set(tmp_path):
    miniatures.vqav2(tmp_path)
    path = submit("vqav2", tmp_path, ["Two dogs.", "the beach"])
    assert json.loads(path.read_text()) == [
        {"question_id": 11, "answer": ""},
        {"question_id": 12, "answer": "2 dogs"},
        {"question_id": 13, "answer": "beach"},
    ]


def test_vizwiz_submission(tmp_path):
    miniatures.vizwiz(tmp_path)
    path = submit("vizwiz", tmp_path, ["Unanswerable", "a can"])
    assert json.loads(path.read_text()) == [
        {"image": "v1.jpg", "answer": "unanswerable"},
        {"image": "v2.jpg", "answer": "can"},
    ]


def test_gqa_seed_and_mm_vet_submissions(tmp_path):
    for name in ("gqa", "seed", "mm_vet"):
        getattr(miniatures, name)(tmp_path)
    path = submit("gqa", tmp_path, ["Yes.", "Red", "left"])
    assert json.loads(path.read_text())[0] == {"questionId": "a1", "prediction": "yes"}
    lines = submit("seed", tmp_path, ["A", "B", "C"]).read_text().splitlines()
    assert json.loads(lines[2]) == {"question_id": "v3", "prediction": "C"}
    assert json.loads(submit("mm_vet", tmp_path, ["x", "y"]).read_text()) == {"v1_0": "x", "v1_1": "y"}


@pytest.mark.parametrize("circular", [False, True])
def test_mmbench_submission_is_the_table_with_a_prediction_column(tmp_path, circular):
    miniatures.mmbench(tmp_path)
    texts = ["B", "A", "C", "A. sodium", "B"] if circular else ["B", "A. sodium"]
    rows = list(openpyxl.load_workbook(submit("mmbench", tmp_path, texts, circular)).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (5, "Which one?", "cat", "dog", "cow", None, "B", "B", "dev")
    assert rows[2] == (7, "Line one\nLine two?", "sodium Na", 'say "no"', None, None, "A. sodium", "A", "dev")


def test_published_rows_are_complete():
    assert len(PUBLISHED) == 8
    assert all(len(row.scores) == len(COLUMNS) for row in PUBLISHED)
    phi = next(row for row in PUBLISHED if row.model.startswith("MoE-LLaVA-2.7Bx4-Top2 "))
    assert (phi.score("POPE"), phi.score("MME"), phi.score("SEED")) == (86.3, 1423.0, None)
    # The POPE column is the mean F1 of the three categories, as our scorer computes it: the paper's two tables agree to
    # the rounding in every row but the last, whose categories average 85.2 where the column says 85.7.
    for row in PUBLISHED[:-1]:
        if row.pope:
            assert sum(f1 for _, f1, _ in row.pope) / 3 == pytest.approx(row.score("POPE"), abs=0.05)
    assert {task.title for task in TASKS.values()} >= set(COLUMNS)


def test_table_shows_the_paper_beside_ours_with_error_and_footnotes():
    pope = {"accuracy": 80.0, "f1": 81.0, "yes_ratio": 50.0}
    records = [
        {
            "benchmark": "pope",
            "title": "POPE",
            "model": "m",
            "value": 81.04,
            "standard_error": 0.96,
            "notes": ["subset: 6 of 9 questions"],
            "details": {"popular": pope},
        },
        {"benchmark": "mm_vet", "title": "MM-Vet", "model": "m", "value": None, "notes": ["not judged"]},
    ]
    lines = format_table(records).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["Model", "act.", "res.", "POPE", "MM-Vet"]
    assert "| LLaVA-Phi" in lines[4]
    assert lines[4].rstrip(" |").endswith("28.9")
    assert "| 81.0 ± 1.0 [1] | - [2]" in lines[10]
    assert "[1] subset: 6 of 9 questions" in lines
    assert "[2] not judged" in lines
    assert any("**m** (ours)" in line and "80.0 / 81.0 / 50.0" in line for line in lines[12:])
    assert any("85.9 / 84.9 / 43.2" in line for line in lines[12:])


def command(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "evaluate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=120,
    )


def test_help_answers_without_torch():
    start = time.perf_counter()
    result = command("--help")
    assert result.returncode == 0
    assert "--score-only" in result.stdout
    assert time.perf_counter() - start < 2.0


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
