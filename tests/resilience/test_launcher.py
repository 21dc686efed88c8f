"""tools/launch.py, the torchrun of the cluster scripts, with real workers: what comes out is what happened inside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.resilience.training import PATIENCE, REPO, newest_step, records, settings


@pytest.fixture
def launched(rows, tmp_path):
    """Two workers, far from their end; returns (process, folder of the run)."""
    save = tmp_path / "save"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(rows, save, training__train_steps=10_000)))
    command = [sys.executable, str(REPO / "tools/launch.py"), "--nproc-per-node", "2", "--standalone"]
    command += [str(REPO / "tools/train.py"), "--config", str(config)]
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    yield process, save
    if process.poll() is None:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()


def wait_for_step(process: subprocess.Popen, save: Path, step: int) -> None:
    deadline = time.monotonic() + 120 * PATIENCE
    while len(records(save)) < step:
        assert process.poll() is None and time.monotonic() < deadline, "no step"
        time.sleep(0.05)


@pytest.mark.parametrize("seconds", [1.0, 3.0, 6.0])
def test_signal_before_the_first_step_is_not_lost(launched, seconds):
    process, save = launched
    time.sleep(seconds)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60 * PATIENCE) == 85
    assert newest_step(save) == len(records(save))


def test_signal_reaches_the_workers_and_their_code_comes_out(launched):
    process, save = launched
    wait_for_step(process, save, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60 * PATIENCE) == 85
    assert newest_step(save) == len(records(save)) >= 3


def test_killed_worker_ends_all_with_137(launched):
    process, save = launched
    wait_for_step(process, save, 3)
    workers = psutil.Process(process.pid).children()
    workers[0].kill()
    assert process.wait(60 * PATIENCE) == 137
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
