"""Files for the benchmarks' servers."""

import json

import pytest

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures


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
    import openpyxl

    miniatures.mmbench(tmp_path)
    texts = ["B", "A", "C", "A. sodium", "B"] if circular else ["B", "A. sodium"]
    rows = list(openpyxl.load_workbook(submit("mmbench", tmp_path, texts, circular)).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (5, "Which one?", "cat", "dog", "cow", None, "B", "B", "dev")
    assert rows[2] == (7, "Line one\nLine two?", "sodium Na", 'say "no"', None, None, "A. sodium", "A", "dev")
