"""Which folder is meant, and which folders count."""

import pytest

from megatron_moellava.checkpoint.folders import (
    RUN_FILE,
    TRACKER,
    complete_iterations,
    iteration_folder,
    newest_checkpoint,
    require_checkpoint,
    write_durably,
    write_tracker,
)
from megatron_moellava.config import CheckpointError


def complete(folder):
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_text("{}")
    return folder


def test_the_newest_complete_folder_is_meant_or_the_folder_itself(tmp_path):
    first, second = complete(iteration_folder(tmp_path, 9)), complete(iteration_folder(tmp_path, 10))
    for suffix in (".tmp", ".damaged"):
        complete(iteration_folder(tmp_path, 11).with_suffix(suffix))
    iteration_folder(tmp_path, 12).mkdir()
    assert complete_iterations(tmp_path) == [first, second]
    assert newest_checkpoint(tmp_path) == require_checkpoint(tmp_path) == second
    assert newest_checkpoint(first) == require_checkpoint(str(first)) == first
    assert newest_checkpoint(tmp_path / "none") is None


def test_what_is_there_instead_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        require_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="make one with moellava convert"):
        require_checkpoint(tmp_path)
    iteration_folder(tmp_path, 3).mkdir()
    for path in (tmp_path, iteration_folder(tmp_path, 3)):
        with pytest.raises(CheckpointError, match="iter_0000003: the save or the copy was interrupted"):
            require_checkpoint(path)


def test_small_files_are_replaced_whole(tmp_path):
    write_tracker(tmp_path, 5)
    write_tracker(tmp_path, 10)
    assert (tmp_path / TRACKER).read_text() == "10\n"
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError):
        write_durably(tmp_path / "target", b"a folder is not replaced")
