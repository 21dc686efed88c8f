"""Benchmarks by name: their files, where they come from, and what does not fit together."""

import pytest

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.evaluation.tasks import TASKS, get_task
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


def test_missing_data_says_what_and_where_from(tmp_path):
    (tmp_path / "pope" / "coco").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        get_task("pope").read(tmp_path)
    message = str(error.value)
    assert "POPE: 5 of 5 are missing" in message
    assert f"{tmp_path}/pope/val2014   <- missing" in message
    assert "github.com/AoiDragon/POPE" in message
    miniatures.pope(tmp_path)
    assert len(get_task("pope").read(tmp_path)) == 6


@pytest.mark.parametrize("name", list(TASKS))
def test_each_missing_file_is_named_with_its_origin(tmp_path, name):
    task = get_task(name)
    folder = tmp_path / task.folder
    wanted = [part for part in (task.questions, task.images, *task.pictures, *task.needs) if part not in ("", ".")]
    for part in wanted:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).touch()
    task.check_data(tmp_path)
    for part in wanted:
        (folder / part).rename(tmp_path / "elsewhere")
        with pytest.raises(DataError) as error:
            task.check_data(tmp_path)
        assert f"{task.title}: 1 of" in str(error.value)
        assert f"  {folder / part}   <- missing\n" in str(error.value)
        assert str(error.value).endswith(task.origin)
        (tmp_path / "elsewhere").rename(folder / part)


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(ConfigError, match="mmbench"):
        get_task("mmbensh")


def test_rotating_options_is_refused_where_there_are_none(tmp_path):
    miniatures.gqa(tmp_path)
    with pytest.raises(ConfigError, match="circular"):
        get_task("gqa").read(tmp_path, circular=True)
