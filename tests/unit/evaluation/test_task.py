"""What every benchmark's record does: it finds its files, or says where they come from."""

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.tasks import TASKS, get_task
from tests.helpers import evaluation_miniatures as miniatures


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
