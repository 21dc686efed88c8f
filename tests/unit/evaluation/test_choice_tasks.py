"""Benchmarks of several pictures and videos through the runner and the real engine."""

import pytest

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.evaluation.generation import CheckpointAnswers
from megatron_moellava.evaluation.runner import Answer
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_runs import predictions_of, run
from tests.helpers.inference_models import tiny_engine


class Choosing:
    """Says the same to every question, and remembers what it was shown."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def generate(self, requests):
        for request in requests:
            self.asked.append(request)
            yield Answer(request_id=request.id, text=self.answer)


@pytest.mark.parametrize(
    ("said", "value"), [("B", 100), ("(B) right", 100), ("B. right", 100), ("right.", 100), ("A", 0)]
)
def test_an_answer_counts_as_letter_or_words(tmp_path, said, value):
    miniatures.choices(tmp_path)
    assert run("choices", tmp_path, Choosing(said))["value"] == value


def test_pictures_and_videos_are_shown_in_their_places(tmp_path):
    miniatures.choices(tmp_path)
    engine = Choosing("B")
    record = run("choices", tmp_path, engine)
    first, second = (request.turns[0].text for request in engine.asked)
    assert first.startswith("Is <image> like <image>?") and second.startswith("<video>\nWhat happens?")
    assert record["details"] == {"all": 100.0, "unreadable": 0}


def test_the_engine_sees_the_frames(tmp_path):
    miniatures.choices(tmp_path)
    engine = tiny_engine(MoEConfig(), max_batch_size=2)
    prompts = []
    fit = engine.fit

    def noted(request):
        prompts.append(request)
        return fit(request)

    engine.fit = noted
    run("choices", tmp_path, CheckpointAnswers(engine))
    assert [len(request.images) for request in prompts] == [2, 8]
    assert prompts[1].turns[0].text.startswith("<image>" * 8 + "\nWhat happens?")
    assert len(predictions_of(tmp_path, "choices")) == 2
    parallel.shutdown()
