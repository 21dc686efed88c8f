"""Starts the processes of `worker.py` once for all jobs that the collected tests ask for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import REPO

HERE = Path(__file__).parent


def launch(jobs: list[dict], folder: Path, patience_seconds: float = 5400) -> None:
    """Run `jobs` (dicts with id, run, world and what the function takes); their results are JSON files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    processes = []
    for rank in range(max(job["world"] for job in jobs)):
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, str(HERE / "worker.py"), str(folder), str(rank), str(jobs_file)]
            processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        for process in processes:
            process.wait(patience_seconds)
    finally:
        for process in processes:
            process.kill()
        _remove_what_is_large(folder, [job["id"] for job in jobs])


def _remove_what_is_large(folder: Path, ids: list[str]) -> None:
    """pytest keeps the folders of its last three runs; numbers and logs are enough."""
    for name in ids:
        for checkpoint in (folder / name).glob("iter_*"):
            shutil.rmtree(checkpoint)
    for reference in folder.glob("*.reference.pt"):
        reference.unlink()
