"""Checkpoints that were damaged after they were written: the newest good one is used, the log says so, none is lost."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.resilience.training import assert_same, last_checkpoint, newest_step, records, run, settings, start


def largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    with largest(checkpoint).open("r+b") as file:
        file.truncate(largest(checkpoint).stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def exchange(ranks: Path) -> None:
    """Each rank would go on from the other's place in the data. (The generators of two data-parallel ranks are the same.)"""
    first, second = ranks / "data_00000.pt", ranks / "data_00001.pt"
    assert first.read_bytes() != second.read_bytes(), "else nothing would be exchanged"
    aside = first.rename(ranks / "aside")
    second.rename(first)
    aside.rename(second)


def change_iteration(checkpoint: Path) -> None:
    text = (checkpoint / "run.json").read_text()
    (checkpoint / "run.json").write_text(text.replace('"consumed_samples": ', '"consumed_samples": 1', 1))


DAMAGE = {
    "truncated shard": truncate,
    "empty shard": lambda checkpoint: largest(checkpoint).write_bytes(b""),
    "flipped bit in a shard": lambda checkpoint: flip(largest(checkpoint)),
    "exchanged data positions": lambda checkpoint: exchange(checkpoint / "ranks"),
    "flipped bit in the generators": lambda checkpoint: flip(checkpoint / "ranks/generators_00000.pt"),
    "missing shard": lambda checkpoint: largest(checkpoint).unlink(),
    "flipped bit in .metadata": lambda checkpoint: flip(checkpoint / ".metadata"),
    "missing generators": lambda checkpoint: (checkpoint / "ranks/generators_00001.pt").unlink(),
    "flipped bit in the data position": lambda checkpoint: flip(checkpoint / "ranks/data_00000.pt"),
    "truncated run.json": lambda checkpoint: (checkpoint / "run.json").write_text("{"),
    "changed run.json": change_iteration,
}


@pytest.fixture(scope="session")
def half_way(rows, tmp_path_factory) -> Path:
    """A run of two ranks that was killed when it had checkpoints 2, 4 and 6."""
    save = tmp_path_factory.mktemp("half") / "save"
    job = start(settings(rows, save, checkpoint__keep=9), 2)
    job.wait_for_checkpoint(6)
    job.signal(signal.SIGKILL)
    job.wait()
    for later in save.glob("iter_*"):
        if later.name not in ("iter_0000002", "iter_0000004", "iter_0000006"):
            shutil.rmtree(later)
    return save


def intact(checkpoint: Path) -> bool:
    expected = json.loads((checkpoint / "run.json").read_text())["sha256"]
    return all(
        (checkpoint / name).is_file() and hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == digest
        for name, digest in expected.items()
    )


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, half_way, rows, reference, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(half_way, save)
    damage(save / "iter_0000006")
    job = run(settings(rows, save, checkpoint__keep=9), 2)
    assert set(job.codes.values()) == {0}, job.log()
    assert "iter_0000006" in job.log() and "set aside as iter_0000006.damaged" in job.log()
    assert (save / "iter_0000006.damaged").is_dir()
    assert_same(save, reference(2))


def test_two_damaged_ones_are_passed_over(half_way, rows, reference, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(half_way, save)
    truncate(save / "iter_0000006")
    flip(largest(save / "iter_0000004"))
    job = run(settings(rows, save), 2)
    assert set(job.codes.values()) == {0}, job.log()
    assert_same(save, reference(2))


def test_a_run_of_damaged_checkpoints_is_not_started_anew(half_way, rows, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(half_way, save)
    for step in (2, 4, 6):
        truncate(save / f"iter_{step:07d}")
    job = run(settings(rows, save), 2)
    assert set(job.codes.values()) == {2}, job.log()
    assert "all checkpoints are damaged" in job.log()
    assert len(list(save.glob("iter_*/run.json"))) == 3, "nothing may be thrown away"


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_never_deletes_the_last_good_one(keep, half_way, rows, tmp_path):
    """Only 2 is good. After the next save 4 is too; whatever is removed then, a good one must be left."""
    save = tmp_path / "save"
    shutil.copytree(half_way, save)
    truncate(save / "iter_0000006")
    truncate(save / "iter_0000004")
    job = run(settings(rows, save, checkpoint__keep=keep, training__train_steps=4), 2)
    assert set(job.codes.values()) == {0}, job.log()
    left = sorted(path for path in save.glob("iter_*") if path.name[5:].isdigit())
    assert newest_step(save) == 4 and left[-1].name == "iter_0000004"
    assert all(intact(path) for path in left)
    assert len(left) == keep


def test_a_damaged_starting_point_is_refused_with_the_file_named(half_way, rows, tmp_path):
    """checkpoint.load is what the user chose; another one in its place would be a silent change."""
    load = tmp_path / "load"
    shutil.copytree(half_way, load)
    damaged = largest(load / "iter_0000006")
    flip(damaged)
    job = run(settings(rows, tmp_path / "save", checkpoint__load=str(load)), 2)
    assert set(job.codes.values()) == {2}, job.log()
    assert f"{damaged.name} (differs from what was written)" in job.log()


def test_second_job_in_one_folder_is_refused_and_the_first_is_not_harmed(rows, reference, tmp_path):
    save = tmp_path / "save"
    first = start(settings(rows, save, training__train_steps=10_000, checkpoint__save_interval=50), 2)
    first.wait_for_step(2)
    tree = settings(rows, save)
    second = start(tree, 1)
    assert second.wait() == [2], second.log()
    assert f"process {first.pids[0]} on" in second.log() and "is writing to it" in second.log()
    assert not first.poll(), first.log()
    first.signal(signal.SIGTERM)
    assert first.wait() == [85, 85]
    assert newest_step(save) == len(records(save))


def test_folder_of_a_killed_job_is_free_at_once(rows, reference, tmp_path):
    save = tmp_path / "save"
    job = start(settings(rows, save, data__num_workers=1), 2)
    job.wait_for_checkpoint(4)
    job.signal(signal.SIGKILL)
    job.wait()
    again = run(settings(rows, save, data__num_workers=1), 2)
    assert set(again.codes.values()) == {0}, again.log()
    assert_same(save, reference(2, data__num_workers=1))
    assert (last_checkpoint(save) / "run.json").exists()
