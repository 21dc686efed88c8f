"""A benchmark from its question file to its score through the real engine."""

import json

import pytest

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.evaluation.generation import CheckpointAnswers
from megatron_moellava.evaluation.runner import Options, evaluate, make_request, read_questions
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.inference_models import tiny_engine


@pytest.fixture
def engine():
    yield tiny_engine(MoEConfig(), max_batch_size=3)
    parallel.shutdown()


@pytest.mark.parametrize("name", ["pope", "gqa"])
def test_every_question_is_answered_by_the_model(tmp_path, engine, name):
    getattr(miniatures, name)(tmp_path)
    task, options = get_task(name), Options(progress=False, bootstrap_samples=20)
    record = evaluate(task, tmp_path, tmp_path / "out", CheckpointAnswers(engine), model="tiny", options=options)
    assert record is not None
    rows = [json.loads(line) for line in (tmp_path / "out" / name / "predictions.jsonl").open()]
    questions = read_questions(task, tmp_path, options).chosen
    assert len(rows) == len(questions)
    alone = next(CheckpointAnswers(engine).generate([make_request(task, questions[0])]))
    assert rows[0]["text"] == alone.text.strip()


def test_the_pictures_matter(tmp_path, engine):
    miniatures.pope(tmp_path)
    task = get_task("pope")
    said = {}
    for blank in (False, True):
        chosen = read_questions(task, tmp_path, Options(blank_images=blank)).chosen
        requests = [make_request(task, question) for question in chosen]
        said[blank] = sorted(
            (answer.request_id, answer.text) for answer in CheckpointAnswers(engine).generate(requests)
        )
    assert said[False] != said[True]
