"""Where answers are kept, and what they are never mixed with."""

import pytest

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.evaluation.predictions import Place
from megatron_moellava.evaluation.runner import Answer, Options, evaluate
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_runs import QUIET, run


class Oracle:
    """Answers a request by the first key of the table that occurs in its text; last asked, first answered."""

    def __init__(self, table, default="yes", stop_after=None):
        self.table, self.default, self.stop_after = table, default, stop_after
        self.asked = []

    def generate(self, requests):
        for number, request in enumerate(reversed(list(requests))):
            if number == self.stop_after:
                raise KeyboardInterrupt
            text = request.turns[-1].text
            assert text.count("<image>") == len(request.images)
            for picture in request.images:
                assert picture.open().mode == "RGB"
            self.asked.append(request)
            yield Answer(
                request_id=request.id,
                text=next((f" {answer}\n" for key, answer in self.table.items() if key in text), self.default),
            )


def test_answers_that_rank_0_cannot_see_are_an_error(tmp_path):
    miniatures.gqa(tmp_path)
    with pytest.raises(DataError, match=r"1 of 3 answers are missing.*shared file system"):
        run("gqa", tmp_path, Oracle({}), place=Place(rank=0, world_size=2))


def test_a_folder_never_mixes_two_runs(tmp_path):
    miniatures.gqa(tmp_path)
    run("gqa", tmp_path, Oracle({}))
    with pytest.raises(ConfigError, match=r"model='ours', this run has model='other'"):
        evaluate(get_task("gqa"), tmp_path, tmp_path / "out", Oracle({}), model="other", options=QUIET)
    with pytest.raises(ConfigError, match="blank_images=False"):
        run("gqa", tmp_path, Oracle({}), options=Options(progress=False, blank_images=True))
    path = tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text().replace("a1?", "a1 again?"))
    with pytest.raises(ConfigError, match="questions="):
        run("gqa", tmp_path, Oracle({}))
