"""kill -9 at random moments of a very short quickstart: continued, it ends as one that was never disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import REPO
from tests.resilience.training import PATIENCE, digests, records

RUNS = ("stage1", "stage2", "stage3", "dense", "names", "names_moe", "names_dense")
SHORT = ("--preset", "names", "--steps-scale", "0.01", "--questions", "200", "checkpoint.save_interval=2")
KILLS = max(3, int(os.environ.get("KILLS", "200")) // 40)


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "examples/quickstart/run.py"), "--out", str(out), *SHORT]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": str(REPO)}
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
    """(what a whole run leaves, its seconds)"""
    out, started = tmp_path_factory.mktemp("quickstart") / "whole", time.monotonic()
    assert start(out).wait(600 * PATIENCE) == 0, out.with_suffix(".log").read_text()[-3000:]
    return out, time.monotonic() - started


def test_a_killed_quickstart_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    """Each attempt gets a little further than the shortest part takes, so that the kills meet every part in turn."""
    whole, seconds = undisturbed
    out, draw, killed = tmp_path / "killed", random.Random(1), []
    while len(killed) < KILLS:
        process = start(out)
        try:
            code = process.wait(draw.uniform(0.15, 0.6) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed.append(
                sorted(file.stem for file in out.glob("parts/*.json") if json.loads(file.read_text())["done"])
            )
            continue
        assert code == 0, out.with_suffix(".log").read_text()[-3000:]
        break
    assert start(out).wait(600 * PATIENCE) == 0, out.with_suffix(".log").read_text()[-3000:]
    print(f"\nparts that were done at each kill: {killed}")
    assert killed and "done before" in out.with_suffix(".log").read_text()
    same(out, whole)


def same(out: Path, whole: Path) -> None:
    """Tower, checkpoints, losses, answers and the summary, but for what tells times."""
    assert (out / "tower/model.safetensors").read_bytes() == (whole / "tower/model.safetensors").read_bytes()
    for name in RUNS:
        assert digests(out / name) == digests(whole / name)
        here, there = records(out / name), records(whole / name)
        assert [(step["iteration"], step["loss"]) for step in here] == [
            (step["iteration"], step["loss"]) for step in there
        ]
        answers = "names_predictions.jsonl" if name.startswith("names") else "predictions.jsonl"
        assert (out / name / answers).read_text() == (whole / name / answers).read_text()
    mine, other = (json.loads((folder / "summary.json").read_text()) for folder in (out, whole))
    for timed in ("seconds", "tokens_per_second"):
        assert mine.pop(timed).keys() == other.pop(timed).keys()
    assert mine == other
