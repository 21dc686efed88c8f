"""tools/train.py as SLURM sees it: signals, exit codes, and the same command once more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_moellava.checkpoint.folders import newest_checkpoint
from tests.helpers import data_files
from tests.helpers.paths import REPO


@pytest.fixture
def command(tmp_path) -> list[str]:
    """A run on the real loader that is far from its end when the signal comes."""
    rows = data_files.make_set(tmp_path / "rows", 40)
    config = {
        "model": {"backbone": "phi-2-tiny", "tower": str(data_files.ASSETS / "openai/clip-tiny")},
        "moe": {"num_moe_experts": 2, "placement": "second_half"},
        "data": {
            "sources": [{"path": str(rows), "image_folder": str(rows.parent)}],
            "tokenizer": str(data_files.ASSETS / "tok_bpe"),
            "template": "phi",
            "seq_length": 160,
            "packing_buffer": 8,
            "num_workers": 0,
        },
        "training": {"stage": 3, "precision": "fp32", "train_steps": 100_000, "global_batch_size": 2, "device": "cpu"},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"save": str(tmp_path / "save"), "save_interval": 100_000},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, str(REPO / "tools/train.py"), "--config", str(path)]


def start(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=REPO
        )


def steps_done(save: Path) -> int:
    path = save / "steps.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def interrupt(command: list[str], number: int, save: Path, log: Path) -> int:
    """Send the signal after two more steps; returns the exit code."""
    process, before = start(command, log), steps_done(save)
    deadline = time.monotonic() + 240
    while steps_done(save) < before + 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    try:
        return process.wait(120)
    finally:
        process.kill()


def test_signals_leave_a_complete_checkpoint_and_the_same_command_continues(command, tmp_path):
    save = tmp_path / "save"
    iterations = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        log = tmp_path / f"{number}.log"
        assert interrupt(command, number, save, log) == 85, log.read_text()
        iterations.append(int((save / "latest_checkpointed_iteration.txt").read_text()))
        assert (save / f"iter_{iterations[-1]:07d}" / "run.json").exists()
        assert not list(save.glob("*.tmp"))
    assert iterations[1] > iterations[0]
    assert f"step {iterations[0] + 1}/" in log.read_text(), "it started anew"
    assert steps_done(save) == iterations[1], "a step was made twice or lost"


def test_diverging_run_exits_with_3_and_names_samples(command, tmp_path):
    log = tmp_path / "log"
    process = start([*command, "optimizer.lr=1e30", "optimizer.clip_grad=0", "training.non_finite_patience=2"], log)
    assert process.wait(240) == 3, log.read_text()
    assert "2 steps in a row without a finite gradient" in log.read_text()
    assert "id" in log.read_text().partition("the last with samples")[2]


HELD_UP = """
import pathlib, runpy, sys, time
from megatron_moellava.training import background

def write(self):
    pathlib.Path(self.folder, "__0_0.distcp").write_bytes(b"half of it")
    time.sleep(3600)

background.Writing.write = write
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_death_while_saving_in_the_background_leaves_nothing_that_loads(command, tmp_path):
    save = tmp_path / "save"
    options = ["checkpoint.async_save=true", "checkpoint.save_interval=1"]
    process = start([command[0], "-c", HELD_UP, *command[1:], *options], tmp_path / "killed.log")
    deadline = time.monotonic() + 240
    while not (save / "iter_0000001.tmp" / "__0_0.distcp").exists() and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert newest_checkpoint(save) is None
    log = tmp_path / "again.log"
    assert interrupt([*command, *options[:1]], signal.SIGTERM, save, log) == 85, log.read_text()
    assert "step 1/" in log.read_text(), "it started anew"
    assert newest_checkpoint(save) is not None and not list(save.glob("*.tmp"))
