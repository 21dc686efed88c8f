"""Benchmarks of places from the answers to the record."""

import json

import pytest

from megatron_moellava.evaluation.runner import Answer, Options, score_file
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_runs import predictions_of, run


class Seeing:
    """Answers with a place in pixels, whatever the text says."""

    def generate(self, requests):
        for request in requests:
            yield Answer(
                request_id=request.id,
                text="[1, 2, 3, 4]",
                regions=({"kind": "box", "points": [[0, 0], [20, 15]], "image": 0, "start": 0, "end": 12},),
            )


def test_places_that_the_engine_knows_in_pixels_are_kept_and_scored(tmp_path):
    miniatures.referring(tmp_path)
    record = run("refcoco_val", tmp_path, Seeing())
    assert record["value"] == pytest.approx(100 / 3) and record["details"]["answers with a box"] == 100
    rows = predictions_of(tmp_path, "refcoco_val")
    assert rows[0]["metadata"]["regions"][0]["points"] == [[0, 0], [20, 15]]
    assert not record["notes"]


def test_a_file_of_texts_is_read_over_the_padded_square(tmp_path):
    """Of 40 x 30, the left top quarter reaches to 0.5 across and from 5 to 20 of 40 down."""
    miniatures.referring(tmp_path)
    path = tmp_path / "answers.jsonl"
    texts = ["[0, 125, 499, 500]", "no idea", "[500, 500, 999, 874]"]
    path.write_text("".join(json.dumps({"question_id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    task, options = get_task("refcoco_val"), Options(bootstrap_samples=10)
    record = score_file(task, tmp_path, tmp_path / "out", path, model="other", judge=None, options=options)
    assert record["value"] == pytest.approx(200 / 3)
    assert record["notes"] == ["3 answers read as 'thousand' over the padded square"]
