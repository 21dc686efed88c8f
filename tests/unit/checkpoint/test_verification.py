"""Is a checkpoint still what was written? test_damage.py damages one in every way."""

import pytest

from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
from megatron_moellava.checkpoint.folders import TRACKER, iteration_folder, require_checkpoint, write_tracker
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint, file_digests
from megatron_moellava.checkpoint.verification import add_digests, digests_together, verify_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "ranks").mkdir()
    for name in ("a.distcp", "ranks/b.pt"):
        (tmp_path / name).write_bytes(name.encode())
    digests = file_digests(tmp_path, ["a.distcp", "ranks/b.pt"])
    write_description(tmp_path, RunDescription(iteration=3, model={}, sha256=digests))
    return tmp_path


@pytest.mark.parametrize("together", [False, True])
def test_an_intact_checkpoint_is_described(checkpoint, together, world):
    said: list[str] = []
    assert verify_checkpoint(checkpoint, together=together, say=said.append).iteration == 3 and said == []


@pytest.mark.parametrize("together", [False, True])
def test_every_file_that_differs_is_named(checkpoint, together, world):
    (checkpoint / "a.distcp").write_bytes(b"another")
    (checkpoint / "ranks/b.pt").unlink()
    with pytest.raises(DamagedCheckpoint) as damaged:
        verify_checkpoint(checkpoint, together=together)
    assert "a.distcp (differs from what was written), ranks/b.pt (is missing)" in str(damaged.value)


def test_a_step_that_the_tracker_file_names_is_said_to_be_an_older_one(tmp_path):
    for step in (2, 4, 6):
        iteration_folder(tmp_path, step).mkdir()
        write_description(iteration_folder(tmp_path, step), RunDescription(iteration=step, model={}))
    said: list[str] = []
    write_tracker(tmp_path, 6)
    verify_checkpoint(require_checkpoint(tmp_path), say=said.append)
    assert not [text for text in said if TRACKER in text]
    write_tracker(tmp_path, 2)
    verify_checkpoint(require_checkpoint(tmp_path), say=said.append)
    (note,) = [text for text in said if TRACKER in text]
    assert "iter_0000002 is used" in note and note.endswith("the newer iter_0000004, iter_0000006")


def test_whoever_does_without_is_told_so(checkpoint):
    (checkpoint / "a.distcp").write_bytes(b"another")
    said: list[str] = []
    assert verify_checkpoint(checkpoint, verify=False, say=said.append).iteration == 3
    assert "nothing of" in said[0] and "--no-verify" in said[0]


def test_files_that_no_run_wrote_are_mentioned_and_not_used(checkpoint):
    (checkpoint / "notes.txt").touch()
    said: list[str] = []
    verify_checkpoint(checkpoint, say=said.append)
    assert "files that no run wrote there, they are not used: notes.txt" in said[0]


def test_digests_are_added_once_and_only_where_there_are_none(checkpoint):
    assert not add_digests(checkpoint)
    write_description(checkpoint, RunDescription(iteration=3, model={}))
    said: list[str] = []
    verify_checkpoint(checkpoint, say=said.append)
    assert "of an older version: its files have no digests" in said[0]
    assert add_digests(checkpoint) and not add_digests(checkpoint)
    assert sorted(read_description(checkpoint).sha256) == ["a.distcp", "ranks/b.pt"]


def test_known_digests_are_not_computed_again(checkpoint, world):
    found = digests_together(checkpoint, {"a.distcp": "known"})
    assert found["a.distcp"] == "known" and found["ranks/b.pt"] == read_description(checkpoint).sha256["ranks/b.pt"]
