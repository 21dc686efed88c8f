"""One process of a launch: runs a list of jobs one after another, each on the first `world` ranks, in a fresh layout.

Starting a process costs more than most jobs, so all layouts share one launch. A job's results are a JSON file of its
own; a job that fails leaves its traceback there, and its peers give up after TIMEOUT.
"""

import datetime
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from tests.helpers.process_groups import release_groups

TIMEOUT = datetime.timedelta(seconds=90)
PATIENCE = datetime.timedelta(minutes=60)  # for jobs of other ranks


def main() -> None:
    folder, rank, jobs = Path(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    from tests.distributed import allocations, balancing, places, runs
    from tests.distributed import jobs as layout_jobs

    functions = vars(layout_jobs) | vars(runs) | vars(allocations) | vars(balancing) | vars(places)
    store = dist.FileStore(str(folder / "rendezvous"), -1)
    for number, job in enumerate(jobs):
        if rank >= job["world"]:
            continue
        _meet(store, f"job{number}", rank, job["world"])
        started = time.perf_counter()
        result_file = folder / f"{job['id']}.json"
        try:
            result = functions[job["run"]](job, folder)
        except BaseException:
            result = {"error": traceback.format_exc()}
            result_file = result_file if rank == 0 else folder / f"{job['id']}.rank{rank}.json"
        finally:
            parallel.shutdown()
            release_groups()
        seconds = time.perf_counter() - started
        print(f"{job['id']} rank {rank}: {seconds:.1f} s", result.get("error", ""), flush=True)
        if rank == 0 or "error" in result:
            temporary = result_file.with_suffix(".tmp")
            temporary.write_text(json.dumps(result | {"seconds": seconds}))
            temporary.rename(result_file)


def _meet(store: dist.Store, name: str, rank: int, world: int) -> None:
    """Join the process group of one job; the ranks come from jobs of different length."""
    mine = dist.PrefixStore(name, store)
    mine.set_timeout(PATIENCE)
    mine.set(f"ready{rank}", "yes")
    mine.wait([f"ready{peer}" for peer in range(world)], PATIENCE)
    os.environ["WORLD_SIZE"] = str(world)  # what torchrun would say
    dist.init_process_group("gloo", store=mine, rank=rank, world_size=world, timeout=TIMEOUT)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
