"""Disks that are full or read-only, and clocks that jump."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.resilience.training import (
    PATIENCE,
    REPO,
    assert_same,
    newest_step,
    records,
    run,
    settings,
    start,
    unfinished,
)


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_full_disk_ends_the_run_with_a_message_and_room_lets_it_go_on(background, rows, reference, disk):
    """The disk has room for one checkpoint and a part of the next."""
    size = sum(path.stat().st_size for path in reference(2).glob("iter_0000012/**/*") if path.is_file())
    save = disk(f"{int(1.6 * size / 1024)}k") / "save"
    tree = settings(rows, save, checkpoint__async_save=background)
    job = run(tree, 2)
    assert set(job.codes.values()) == {2}, job.log()
    assert "cannot write the checkpoint" in job.log() and "MiB are free there" in job.log()
    assert "it continues from iter_0000002" in job.log()
    assert newest_step(save) == 2 and not unfinished(save)
    disk(f"{8 * size // 1024}k")
    again = run(tree, 2)
    assert set(again.codes.values()) == {0}, again.log()
    assert_same(save, reference(2))


def test_full_disk_does_not_hang_when_only_one_rank_meets_it(rows, tmp_path):
    """Rank 1 alone cannot write; rank 0 must not wait for it for ever."""

    def sabotage(rank: int) -> None:
        real = os.fsync

        def fails(number: int) -> None:
            if newest_step(tmp_path / "save") == 2:
                raise OSError(28, "No space left on device")
            real(number)

        if rank == 1:
            os.fsync = fails

    job = start(settings(rows, tmp_path / "save"), 2, sabotage)
    assert job.wait(60) == [2, 2], job.log()
    assert "rank 1: " in job.log()
    assert newest_step(tmp_path / "save") == 2


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_log_that_cannot_be_written_does_not_end_the_run(tensorboard, rows, reference, disk, tmp_path):
    logs = disk("8k")
    changes = {"logging__directory": str(logs), "logging__tensorboard": tensorboard}
    job = run(settings(rows, tmp_path / "save", **changes), 2)
    assert set(job.codes.values()) == {0}, job.log()
    assert "cannot write the log" in job.log()
    assert newest_step(tmp_path / "save") == newest_step(reference(2))


def test_read_only_folder_is_found_before_anything_starts(rows, disk, tmp_path):
    folder = disk("8m")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    started = time.monotonic()
    job = run(settings(rows, folder / "save"), 2, logs=tmp_path / "logs")
    assert set(job.codes.values()) == {2}, job.log()
    assert f"checkpoint.save={folder}/save cannot be written to" in job.log()
    assert time.monotonic() - started < 10 * PATIENCE


def test_folder_that_becomes_read_only_keeps_what_it_has(rows, reference, tmp_path):
    """As when a file system is remounted read-only after an error."""
    save = tmp_path / "save"
    job = start(settings(rows, save, logging__directory=str(tmp_path / "logs")), 2)
    job.wait_for_checkpoint(2)
    try:
        subprocess.run(
            ["chattr", "+i", str(save)], check=True
        )  # ext4, xfs, btrfs; elsewhere: PYTEST_ARGS=--basetemp=...
        assert job.wait() == [2, 2], job.log()
    finally:
        job.end()
        subprocess.run(["chattr", "-i", str(save)])
    assert "cannot write the checkpoint" in job.log()
    again = run(settings(rows, save, logging__directory=str(tmp_path / "logs")), 2)
    assert set(again.codes.values()) == {0}, again.log()
    assert newest_step(save) == newest_step(reference(2))


# --- clocks -----------------------------------------------------------------------------------------------------------

FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
JUMPS = ("-3h", "+2d", "-400d")


def jumping(rank: int) -> None:
    """Python's wall clock is set to another time with every question."""
    real, jumps = time.time, [0]

    def jump() -> float:
        jumps[0] += 1
        return real() + (-1) ** jumps[0] * 86_400 * jumps[0]

    time.time = jump


def assert_sane_times(save: Path, log: str) -> None:
    times = [step["time"] for step in records(save)]
    assert times == sorted(times) and len(set(times)) > 1
    assert all(0 < step["step_seconds"] < 3600 and step["tokens_per_second"] > 0 for step in records(save))
    left = [float(line.rpartition("|")[2].split()[0]) for line in log.splitlines() if line.endswith(" left")]
    assert left and all(seconds >= 0 for seconds in left)


def test_jumping_clock_changes_no_number(rows, reference, tmp_path):
    save = tmp_path / "save"
    job = run(settings(rows, save), 2, jumping)
    assert set(job.codes.values()) == {0}, job.log()
    assert_sane_times(save, job.log())
    assert_same(save, reference(2))


def test_times_do_not_go_back_when_a_run_continues_under_an_earlier_clock(rows, tmp_path):
    def yesterday(rank: int) -> None:
        real = time.time
        time.time = lambda: real() - 86_400

    save = tmp_path / "save"
    assert set(run(settings(rows, save, training__train_steps=4), 1).codes.values()) == {0}
    job = run(settings(rows, save), 1, yesterday)
    assert set(job.codes.values()) == {0}, job.log()
    assert_sane_times(save, job.log())


@pytest.mark.skipif(not FAKETIME, reason="apt-get install libfaketime")
def test_clock_of_the_system_jumps_under_a_real_process(rows, reference, tmp_path):
    """libfaketime below Python and torch: what every library of the process takes for the time."""
    save, now = tmp_path / "save", tmp_path / "now"
    now.write_text("+0")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(rows, save)))
    environment = os.environ | {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(now),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": str(REPO),
    }
    command = [sys.executable, str(REPO / "tools/train.py"), "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    jumped = 0
    while process.poll() is None:
        if jumped < len(JUMPS) and len(records(save)) >= 2 * (jumped + 1):
            now.write_text(JUMPS[jumped])
            jumped += 1
        time.sleep(0.02)
    text = (tmp_path / "log").read_text()
    assert process.returncode == 0, text
    assert jumped == len(JUMPS)
    assert_sane_times(save, text)
    assert_same(save, reference(1))
    shutil.rmtree(save)
