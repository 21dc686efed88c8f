"""Is a checkpoint still what was written? test_damage.py damages one in every way."""

import pytest

from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
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
