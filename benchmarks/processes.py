"""Benchmarks of several processes: a script starts itself once per number of processes, and collects what they wrote."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def in_processes(
    script: str, description: str | None, processes: dict[str, int], work: Callable[[list[str], Path], None]
) -> dict[str, dict] | None:
    """{layout: what `work` wrote to FOLDER/layout.json} of layouts on so many processes each.

    `work(layouts, FOLDER)` runs in every process of a torchrun, one thread each; such a process gets None and ends.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.out)
        return None
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(set(processes.values())):
            names = [name for name, wanted in processes.items() if wanted == count]
            _launch(script, count, "--out", folder, "--worker", *names)
        return {name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in processes}


def _launch(script: str, processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([*command, script, *arguments], check=True, env=environment, stdout=sys.stderr)
