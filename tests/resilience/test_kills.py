"""kill -9, KILLS times: one process, one rank of two, both ranks; at any moment of a run and inside its checkpoint saves.

Every run is killed and continued until it reaches its end, and must then equal an undisturbed one bit by bit.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.resilience.training import assert_same, newest_step, records, settings, start, unfinished

KILLS = int(os.environ.get("KILLS", "200"))  # shared among the eight campaigns below
CAMPAIGNS = [("alone", 1, seed) for seed in (1, 2)]
CAMPAIGNS += [("one rank", 2, seed) for seed in (3, 4, 5)] + [("all ranks", 2, seed) for seed in (6, 7, 8)]


@pytest.mark.parametrize(("who", "world", "seed"), CAMPAIGNS)
def test_killed_run_continues_bit_by_bit(who, world, seed, rows, reference, tmp_path):
    kills = max(1, KILLS // len(CAMPAIGNS))
    campaign(who, world, seed, kills, settings(rows, tmp_path / "save"), reference(world))


def test_killed_background_save_continues_bit_by_bit(rows, reference, tmp_path):
    tree = settings(rows, tmp_path / "save", checkpoint__async_save=True)
    campaign("all ranks", 2, 9, max(1, KILLS // 20), tree, reference(2))


def campaign(who: str, world: int, seed: int, kills: int, tree: dict, expected: Path) -> None:
    draw, save = random.Random(seed), Path(tree["checkpoint"]["save"])
    moments = {"start": 0, "step": 0, "save": 0}
    runs = 0
    while sum(moments.values()) < kills:
        job = start(tree, world)
        before = len(records(save))
        _wait_for_the_moment(job, draw)
        inside, after = unfinished(save), len(records(save))
        job.signal(signal.SIGKILL, [draw.randrange(world)] if who == "one rank" else None)
        codes = job.wait(moment=1)
        if -signal.SIGKILL in codes:
            moments["save" if inside else "step" if after != before else "start"] += 1
            continue
        assert codes == [0] * world, job.log()  # it was at its end already
        assert_same(save, expected)
        runs += 1
        shutil.rmtree(save)
    job = start(tree, world)
    assert job.wait() == [0] * world, job.log()
    assert_same(save, expected)
    print(f"\n{who}: {moments}, {runs + 1} runs completed")
    assert moments["save"] >= kills // 8 and moments["step"] + moments["start"] >= kills // 8


def _wait_for_the_moment(job, draw: random.Random) -> None:
    """Half of the kills at any moment of the seconds that a run takes, half inside a save that has just begun."""
    if draw.random() < 0.5:
        time.sleep(draw.uniform(0.0, 5.0))
        return
    skipped = newest_step(job.save) + 2 * draw.randrange(3)
    job.wait_until(lambda: job.poll() or (unfinished(job.save) and newest_step(job.save) >= skipped), 60, "a save")
    time.sleep(draw.uniform(0.0, 0.15))
