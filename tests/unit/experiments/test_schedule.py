"""Steps run once, after what they need, on cores of their own."""

import os
import sys
from pathlib import Path

import pytest

from megatron_moellava.experiments.nodes import finished
from megatron_moellava.experiments.schedule import Scheduler, core_shares

FAKE = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "order.txt", "a") as file:
    file.write(folder.name + "\\n")
if sys.argv[2] in folder.name:
    sys.exit(7)
unfinished = folder / "done.tmp"
cores = sorted(os.sched_getaffinity(0))
unfinished.write_text(json.dumps({"numbers": {"accuracy": float(len(folder.name)), "cores": cores}}))
unfinished.rename(folder / "done.json")
"""


def scheduler(grid, runs: Path, jobs: int = 2, broken: str = "nothing") -> Scheduler:
    return Scheduler(grid, runs, lambda node: [sys.executable, "-c", FAKE, str(runs / node.name), broken], jobs=jobs)


def test_every_node_runs_once_after_what_it_needs(grid, tmp_path, capsys):
    chains = [grid.chain(cell, seed) for cell, seed in grid.runs()]
    runs = tmp_path / "runs"
    assert scheduler(grid, runs, jobs=3).run(chains) == 0
    order = (runs / "order.txt").read_text().split()
    assert len(order) == len(set(order)) == len({node.name for chain in chains for node in chain})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{len(order)} steps to run, 3 at a time")
    counts = [int(line.split()[0]) for line in said if line.endswith(f"of {len(order)} steps ended")]
    assert counts == sorted(set(counts)) and counts[-1] == len(order)
    for chain in chains:
        for node in chain:
            assert all(order.index(need.name) < order.index(node.name) for need in node.needs())
    assert scheduler(grid, runs).run(chains) == 0
    assert (runs / "order.txt").read_text().split() == order, "something finished was run again"
    assert capsys.readouterr().out == "", "nothing was left to do"


def test_a_failure_stops_what_needs_it_and_nothing_else(grid, tmp_path, capsys):
    runs = tmp_path / "runs"
    chains = [grid.chain(cell, 1) for cell in grid.cells]
    broken = grid.chain("two", 1)[2]
    assert scheduler(grid, runs, broken=broken.name).run(chains) == 1
    assert finished(runs, grid.chain("four", 1)[-1]) is not None
    assert finished(runs, grid.chain("two", 1)[-1]) is None
    said = capsys.readouterr().out
    assert f"{broken.name}: exit code 7" in said
    assert f"{grid.chain('two', 1)[-1].name}: not run" in said


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_job_runs_on_its_own_cores(grid, tmp_path, jobs):
    chains = [grid.chain(cell, seed) for cell, seed in grid.runs()]
    mine = os.sched_getaffinity(0)
    assert scheduler(grid, tmp_path, jobs=jobs).run(chains) == 0
    used = [set(finished(tmp_path, chain[-1])["numbers"]["cores"]) for chain in chains]
    assert all(cores in core_shares(mine, jobs) for cores in used)
    assert os.sched_getaffinity(0) == mine, "the caller keeps its cores"


def test_cores_are_dealt_out_among_the_jobs():
    assert core_shares({0, 1, 2, 3, 4}, 2) == [{0, 2, 4}, {1, 3}]
    assert core_shares({6, 7}, 3) == [{6}, {7}, {6}], "more jobs than cores share them"
