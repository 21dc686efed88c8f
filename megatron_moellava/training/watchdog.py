"""Who is stuck, and where. A hung collective shows on every rank but the guilty one.

Every rank notes what it is about to do; a thread looks at the note. When it has not changed for too long, the rank posts
its note and the place in the code where its main thread is to the rendezvous store; the first to do so collects the posts
of all and names the ranks that are not waiting for others; then every rank leaves with exit code HUNG. The stacks of all
threads go to stderr.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

HUNG = 4  # exit code: no progress; the newest checkpoint continues the run
WAITING = ("torch/distributed/", "megatron_moellava/parallel.py", "megatron_moellava/training/broadcast.py")
_PREFIX = "moellava-watchdog/"


class Watchdog:
    """`at` before each phase of a step; `stop` at the end."""

    def __init__(self, timeout_seconds: float):
        self.timeout = timeout_seconds
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: the main thread's may be the one that hangs.
        self.store = dist.distributed_c10d._get_default_store()
        if hasattr(self.store, "clone") and self.world_size > 1:
            self.store = self.store.clone()
        self.main = threading.main_thread().ident
        self.note, self.since = "start", time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def at(self, step: int, what: str) -> None:
        """Note what this rank begins to do."""
        self.note, self.since = f"step {step}, {what}", time.monotonic()

    def stop(self) -> None:
        """End the watch."""
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self.since > self.timeout:
                self._give_up()

    def _give_up(self) -> None:
        place = self._place()
        post = {"note": self.note, "place": place, "waits": any(part in place for part in WAITING)}
        print(f"rank {self.rank}: no progress for {self.timeout:g} s at {self.note}: {place}", file=sys.stderr)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # Should the store not answer either (it may live in the process that is stuck), leave without a common report.
        threading.Timer(self.timeout + 5, os._exit, [HUNG]).start()
        try:
            self.store.set(f"{_PREFIX}{self.rank}", json.dumps(post))
            if self.store.add(f"{_PREFIX}order", 1) == 1:  # the first one here speaks for all
                print(report(self._collect(), self.timeout), file=sys.stderr, flush=True)
                self.store.set(f"{_PREFIX}done", "")
            else:
                self.store.wait([f"{_PREFIX}done"], timedelta(seconds=self.timeout))
                time.sleep(1.0)  # the reporter's exit code first
        finally:
            os._exit(HUNG)

    def _collect(self) -> list[dict | None]:
        """The posts of all ranks; None for one that does not answer within half the time limit."""
        deadline = time.monotonic() + self.timeout / 2 + 1
        posts: list[dict | None] = []
        for rank in range(self.world_size):
            patience = timedelta(seconds=max(0.1, deadline - time.monotonic()))
            try:
                self.store.wait([f"{_PREFIX}{rank}"], patience)
                posts.append(json.loads(self.store.get(f"{_PREFIX}{rank}")))
            except dist.DistError:
                posts.append(None)
        return posts

    def _place(self) -> str:
        """Where the main thread is: our own innermost frame, and the innermost of all."""
        frame = sys._current_frames().get(self.main or 0)
        frames = traceback.extract_stack(frame) if frame else []
        own = [item for item in frames if "megatron_moellava" in item.filename]
        chosen = ([own[-1]] if own else []) + frames[-1:]
        return " > ".join(dict.fromkeys(f"{item.name} ({item.filename}:{item.lineno})" for item in chosen))


def report(posts: list[dict | None], timeout: float) -> str:
    """The ranks that hold up the others: those that do not answer, else those that are not in a collective, else all."""
    silent = [rank for rank, post in enumerate(posts) if post is None]
    busy = {rank: post for rank, post in enumerate(posts) if post is not None and not post["waits"]}
    lines = [f"no progress for {timeout:g} s; of {len(posts)} ranks"]
    for rank in silent:
        lines.append(f"  rank {rank} does not answer: stopped, swapped out, or its node is gone")
    lines += [f"  rank {rank} holds up the others at {post['note']}: {post['place']}" for rank, post in busy.items()]
    waiting: dict[str, list[int]] = {}
    for rank, post in enumerate(posts):
        if post is not None and post["waits"]:
            waiting.setdefault(f"at {post['note']}: {post['place']}", []).append(rank)
    for where, ranks in waiting.items():
        lines.append(f"  {_names(ranks)} for others {where}")
    return "\n".join(lines)


def _names(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed} waits" if len(ranks) == 1 else f"ranks {listed} wait"
