"""Running the nodes of a grid in their order, several at a time, each in processes of its own.

A node is locked while it runs (a file lock, given up when its process dies), so that the tasks of a SLURM array, or two
people, may share a folder of runs. Free of torch.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from megatron_moellava.exit_codes import INTERRUPTED
from megatron_moellava.experiments.grid import Grid, Node
from megatron_moellava.experiments.nodes import finished


@dataclass(slots=True)
class Scheduler:
    """`start` gives the command line of a node."""

    grid: Grid
    runs: Path
    start: Callable[[Node], list[str]]
    jobs: int = 1
    say: Callable[[str], None] = print
    failed: dict[str, int] = field(default_factory=dict)  # node -> exit code
    children: set[subprocess.Popen] = field(default_factory=set)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def run(self, chains: Sequence[Sequence[Node]], after: Callable[[], None] = lambda: None) -> int:
        """Run what is not finished. `after` is called whenever a node has. Returns 0, 85 after a signal, or 1.

        A node that fails stops those that need it; the others go on.
        """
        waiting = {node.name: node for chain in chains for node in chain if finished(self.runs, node) is None}
        running: dict[Future, Node] = {}
        total = len(waiting)
        if total:
            self.say(f"{total} steps to run, {self.jobs} at a time; each writes to {self.runs}/<its name>.log")
        shares = iter(core_shares(os.sched_getaffinity(0), self.jobs))
        # A thread's children inherit its cores.
        pool = ThreadPoolExecutor(self.jobs, initializer=lambda: os.sched_setaffinity(0, next(shares)))
        with self._signals(), pool:
            while waiting or running:
                for node in [node for node in waiting.values() if self._ready(node)][: self.jobs - len(running)]:
                    del waiting[node.name]
                    running[pool.submit(self._execute, node)] = node
                if not running:
                    break  # what is left needs something that has failed
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    node = running.pop(future)
                    if code := future.result():
                        self.failed[node.name] = code
                    after()
                self.say(f"{total - len(waiting) - len(running)} of {total} steps ended")
        for node in waiting.values():
            self.say(f"{node.name}: not run, since something it needs has failed")
        if INTERRUPTED in self.failed.values():
            return INTERRUPTED
        return 1 if self.failed else 0

    def _ready(self, node: Node) -> bool:
        stopped = INTERRUPTED in self.failed.values()
        return not stopped and all(finished(self.runs, need) is not None for need in node.needs())

    def _execute(self, node: Node) -> int:
        self.runs.mkdir(parents=True, exist_ok=True)
        with locked(self.runs / f"{node.name}.lock"):
            if finished(self.runs, node) is not None:  # another task was faster
                return 0
            self.say(f"{node.name}: started")
            began, log = time.monotonic(), self.runs / f"{node.name}.log"
            with log.open("a") as output:
                child = subprocess.Popen(self.start(node), stdout=output, stderr=subprocess.STDOUT)
                with self.guard:
                    self.children.add(child)
                code = child.wait()
                with self.guard:
                    self.children.discard(child)
        minutes = (time.monotonic() - began) / 60
        if code == 0 and finished(self.runs, node) is None:
            code = 1
        self.say(f"{node.name}: " + (f"{minutes:.1f} min" if code == 0 else f"exit code {code}, see {log}"))
        return code

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 go to the trainings, which write a checkpoint and end with 85."""

        def forward(number, frame):
            self.failed.setdefault("signal", INTERRUPTED)
            for child in list(self.children):
                child.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def core_shares(cores: Iterable[int], jobs: int) -> list[set[int]]:
    """Which cores each job may use: threads of two jobs on one core wait for each other (2.3 instead of 12.5 steps/s)."""
    cores = sorted(cores)
    return [set(cores[number::jobs]) or {cores[number % len(cores)]} for number in range(jobs)]


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the exclusive lock of `file`; waits for whoever has it."""
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def node_command(arguments: Sequence[str], processes: int) -> Callable[[Node], list[str]]:
    """The command line that runs one node: in one process, or a training in several by `moellava launch`."""
    program = [sys.executable, "-m", "megatron_moellava"]

    def start(node: Node) -> list[str]:
        command = ["ablate", *arguments, "--node", node.name]
        if processes > 1 and node.kind == "train":
            return [*program, "launch", "--standalone", f"--nproc-per-node={processes}", *command]
        return [*program, *command]

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the parallelism is in the nodes
    return start
