"""Checkpoints that are written while the training goes on: `checkpoint.async_save`.

Megatron-Core plans a save and hands over what is left to do: copy the tensors to the host, write them, gather the
results. Here the copies are made at once - the next step changes the originals - a thread writes them and computes the
digests of its files, and all ranks finish together, when the thread of each is done. Until then the folder is called
`.tmp`, has no run.json, and no run loads it: a process that dies leaves nothing that looks complete.
"""

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.checkpoint.integrity import file_digest

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async


class Writing:
    """One save of this rank's tensors: planned, copied to the host, not yet written. Planning is collective."""

    def __init__(self, tensors: dict, folder: Path):
        # A queue in place spares Megatron-Core the manager process that it would start for one.
        filesystem_async._results_queue = queue.Queue()
        self.folder = folder
        self.request = dist_checkpointing.save(tensors, str(folder), async_sharded_save=True, async_strategy="mcore")
        self.digests: dict[str, str] = {}  # of the files that this rank has written

    def copy(self) -> None:
        """Take the tensors as they are now, so that they may change before they are written."""
        self._move_to_host()
        if (
            not platform.HAS_CUDA and self.request.async_fn is not None
        ):  # on the host they are the parameters themselves
            rank, buckets, results = self.request.async_fn_args
            self.request = self.request._replace(async_fn_args=[rank, [_copied(item) for item in buckets], results])

    def _move_to_host(self) -> None:
        if self.request.preload_fn is not None:
            rank, _, results = self.request.async_fn_args
            buckets = self.request.preload_fn()
            self.request = self.request._replace(async_fn_args=[rank, buckets, results], preload_fn=None)

    def write(self) -> None:
        """Write this rank's files. Megatron-Core keeps a failure among the results, and `finish` raises it."""
        if self.request.async_fn is None:
            return
        self._move_to_host()
        self.request.async_fn(*self.request.async_fn_args)
        for path, *_ in self.request.async_fn_args[1]:
            if Path(path).exists():
                self.digests[str(Path(path).relative_to(self.folder))] = file_digest(Path(path))

    def finish(self) -> None:
        """Write the metadata of all ranks; collective, raises on all ranks if one could not write."""
        for function in self.request.finalize_fns:
            function()


def _copied(bucket):
    path, key, (plain, tensors) = bucket
    return path, key, (plain, [(item, tensor.clone()) for item, tensor in tensors])


class BackgroundSave:
    """At most one save at a time; collective in all methods."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._complete: Callable[[], Path] | None = None

    def start(self, writing: Writing, complete: Callable[[], Path]) -> None:
        """Begin to write. `complete` runs on all ranks when all have written, and names the folder."""
        assert self._thread is None, "the save before is not finished"
        writing.copy()
        self._complete = complete
        self._thread = threading.Thread(target=writing.write, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> Path | None:
        """Complete the save if all ranks have written; returns its folder then."""
        if self._thread is None:
            return None
        writing = torch.tensor(int(self._thread.is_alive()), device=platform.device())
        dist.all_reduce(writing, op=dist.ReduceOp.MAX)
        return None if writing else self.finish()

    def finish(self) -> Path | None:
        """Wait for the save under way, if there is one, and complete it; returns its folder."""
        if self._thread is None:
            return None
        assert self._complete is not None
        self._thread.join()
        complete, self._thread, self._complete = self._complete, None, None
        return complete()
