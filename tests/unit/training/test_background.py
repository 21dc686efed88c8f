"""Saves that are written while the training goes on."""

import threading

import pytest
import torch

from megatron_moellava.checkpoint.integrity import file_digest
from megatron_moellava.training.background import BackgroundSave, Writing

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor


def tensors(values: torch.Tensor) -> dict:
    return {"weight": ShardedTensor.from_rank_offsets("weight", values)}


def test_what_is_written_is_the_moment_of_the_copy(world, tmp_path):
    values = torch.arange(4.0)
    writing = Writing(tensors(values), tmp_path)
    writing.copy()
    values += 100.0  # the next step
    writing.write()
    writing.finish()
    loaded = dist_checkpointing.load(tensors(torch.zeros(4)), str(tmp_path))["weight"]
    assert loaded.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert writing.digests and all(file_digest(tmp_path / name) == digest for name, digest in writing.digests.items())


class Held:
    """A save whose writing ends when it is told to."""

    def __init__(self):
        self.copied, self.go = False, threading.Event()

    def copy(self):
        self.copied = True

    def write(self):
        self.go.wait(30)


def test_a_save_is_complete_only_when_it_is_written(world, tmp_path):
    save, held, completed = BackgroundSave(), Held(), []
    assert save.poll() is None and save.finish() is None, "nothing is under way"
    save.start(held, lambda: completed.append(True) or tmp_path)
    assert held.copied and save.poll() is None and not completed
    held.go.set()
    assert save.finish() == tmp_path and completed == [True]
    assert save.poll() is None


def test_a_second_save_waits_for_the_first(world, tmp_path):
    save, held = BackgroundSave(), Held()
    save.start(held, lambda: tmp_path)
    with pytest.raises(AssertionError, match="not finished"):
        save.start(Held(), lambda: tmp_path)
    held.go.set()
    save.finish()
