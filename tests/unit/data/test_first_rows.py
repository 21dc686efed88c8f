"""Whether a run can begin with a source, from its first rows."""

import json

import pytest

from megatron_moellava.config import DataError, Source
from megatron_moellava.data.first_rows import FIRST_ROWS, first_rows_problem, shard_counts
from tests.helpers.data_files import config, conversation, make_set, row, write_images, write_rows


def problem(path, **changes) -> str | None:
    return first_rows_problem(Source(path=str(path), image_folder=str(path.parent)), config(path, **changes))


def test_a_good_source_has_no_problem(tmp_path):
    assert problem(make_set(tmp_path, 5)) is None


def test_a_bad_first_row_is_named_unless_bad_rows_are_allowed(tmp_path):
    write_images(tmp_path)
    path = write_rows(tmp_path, [{"id": "bad"}, row(1)])
    assert "rows.json row 0" in problem(path)
    assert problem(path, max_skip_share=0.5) is None
    all_bad = write_rows(tmp_path, [{"id": "bad"}] * 2 * FIRST_ROWS, "bad.json")
    assert problem(all_bad, max_skip_share=0.5) is not None


def test_a_missing_picture_is_found_before_the_run(tmp_path):
    path = write_rows(tmp_path, [row(0, "none.png")])
    assert "none.png does not exist; pass --image-folder DIR" in problem(path)


@pytest.mark.parametrize(("content", "message"), [("[]", "holds no rows"), ("", "holds no rows"), ("[{", "row")])
def test_a_file_without_rows_is_named(tmp_path, content, message):
    (tmp_path / "rows.json").write_text(content)
    assert message in problem(tmp_path / "rows.json")


def test_folders_are_read_by_energons_counts_or_told_what_to_do(tmp_path):
    with pytest.raises(DataError, match="make shards with"):
        shard_counts(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"name its files as sources, such as .*rows\.jsonl"):
        shard_counts(tmp_path)
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": {"a.tar": 3, "b.tar": 2}}))
    assert shard_counts(tmp_path) == {"a.tar": 3, "b.tar": 2} and problem(tmp_path) is None
    (tmp_path / ".nv-meta/.info.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        shard_counts(tmp_path)


def test_a_video_has_as_many_pictures_as_frames_are_shown(tmp_path):
    (tmp_path / "v").mkdir()
    path = write_rows(tmp_path, [{"id": "v", "video": "v", "conversations": conversation("<video>\nWhat?", "red")}])
    assert problem(path, max_images=4, video_frames=4) is None
    assert problem(path, max_images=4, video_frames=8, video_fps=1.0) is None, "a short one may have few"
    assert "5 images, more than data.max_images=4" in problem(path, max_images=4, video_frames=5)
