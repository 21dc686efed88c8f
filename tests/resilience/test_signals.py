"""SIGTERM and SIGUSR1 at random moments: exit code 85, at most the running step waits, nothing is lost."""

import os
import random
import signal
import time

import pytest

from tests.resilience.training import (
    PATIENCE,
    assert_same,
    last_checkpoint,
    newest_step,
    records,
    settings,
    start,
    unfinished,
)

GRACE_SECONDS = 30  # what Kubernetes gives at least; SLURM's recipe has 120


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("world", [1, 2])
def test_signalled_run_saves_and_continues_bit_by_bit(number, world, rows, reference, tmp_path):
    """Eight signals each; the first ones come before there is anything to save."""
    draw, save = random.Random(world), tmp_path / "save"
    tree = settings(rows, save, checkpoint__save_interval=1000)
    signals, codes = 0, []
    while codes != [0] * world:
        job = start(tree, world)
        time.sleep(0.2 * (signals + 1) if signals < 4 else draw.uniform(0.5, 3.0))
        steps = len(records(save))
        sent = time.monotonic()
        if signals < 8:
            job.signal(number)
        codes = job.wait()
        assert set(codes) in ({0}, {85}), (codes, job.log())
        assert time.monotonic() - sent < GRACE_SECONDS * PATIENCE or signals >= 8
        assert newest_step(save) >= steps, "a finished step is not in the checkpoint"
        assert not unfinished(save)
        signals += 1
    assert_same(save, reference(world))


def test_one_signalled_rank_stops_all(rows, tmp_path):
    save = tmp_path / "save"
    job = start(settings(rows, save, training__train_steps=10_000, checkpoint__save_interval=10_000), 2)
    job.wait_for_step(3)
    job.signal(signal.SIGUSR1, [0])
    assert job.wait() == [85, 85], job.log()
    assert newest_step(save) == len(records(save))


def slow_disk(rank: int) -> None:
    """Every file takes a third of a second to reach the disk."""
    real = os.fsync

    def slow(number: int) -> None:
        time.sleep(0.3)
        real(number)

    os.fsync = slow


def test_slow_disk_changes_nothing(rows, reference, tmp_path):
    save = tmp_path / "save"
    assert start(settings(rows, save), 2, slow_disk).wait() == [0, 0]
    assert_same(save, reference(2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signal_inside_a_slow_save(number, rows, reference, tmp_path):
    """The save that runs is finished; a kill leaves the checkpoint before it."""
    save = tmp_path / "save"
    job = start(settings(rows, save), 2, slow_disk)
    job.wait_until(lambda: unfinished(save) and newest_step(save) == 2, 60, "the second save")
    job.signal(number)
    codes = job.wait()
    killed = number == signal.SIGKILL
    assert codes == ([-9, -9] if killed else [85, 85]), job.log()
    assert newest_step(save) == (2 if killed else 4)
    assert (last_checkpoint(save) / "run.json").exists()
    assert start(settings(rows, save), 2).wait() == [0, 0]
    assert_same(save, reference(2))
