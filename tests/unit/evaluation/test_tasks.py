"""Benchmarks by name: their files, where they come from, and what does not fit together."""

import pytest

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


@pytest.mark.parametrize("name", ["gqa", "textvqa", "mme", "scienceqa", "seed"])
def test_truths_of_another_release_are_an_error(tmp_path, name):
    folder = getattr(miniatures, {"scienceqa": "science_qa"}.get(name, name))(tmp_path)
    path = folder / get_task(name).questions
    path.write_text(
        path.read_text().replace('"a1"', '"zz"').replace("What is written?", "What?").replace("Is it", "Was it")
    )
    path.write_text(
        path.read_text().replace('"id": "1"', '"id": "99"').replace('"question_id": 1', '"question_id": 99')
    )
    number = len(get_task(name).read(tmp_path))
    with pytest.raises(DataError, match=r"match|releases"):
        score(name, tmp_path, ["x"] * number)


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(ConfigError, match="mmbench"):
        get_task("mmbensh")


def test_rotating_options_is_refused_where_there_are_none(tmp_path):
    miniatures.gqa(tmp_path)
    with pytest.raises(ConfigError, match="circular"):
        get_task("gqa").read(tmp_path, circular=True)
