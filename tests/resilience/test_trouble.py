"""One rank hangs, is slow, makes NaN, loses its loader worker or its shared memory: who and where is said, and it ends."""

import ctypes
import os
import signal
import subprocess
import time

import pytest
import torch

from tests.resilience.training import PATIENCE, assert_same, newest_step, records, run, settings, start

HUNG = 4
HANG_MINUTES = 0.1 * PATIENCE


def at_step(step: int, method: str, action) -> None:
    """Call `action(trainer)` before the trainer's `method` in one step."""
    from megatron_moellava.training.loop import Trainer

    real = getattr(Trainer, method)

    def sabotaged(self, *arguments, **options):
        if self.state.iteration + 1 == step:
            action(self)
        return real(self, *arguments, **options)

    setattr(Trainer, method, sabotaged)


def stuck(trainer) -> None:
    time.sleep(3600)


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(
    ("method", "phase"),
    [("_next_batch", "reading data"), ("_forward_step", "forward and backward pass")],
)
def test_hung_rank_is_named_with_its_place(guilty, method, phase, rows, reference, tmp_path):
    def sabotage(rank: int) -> None:
        if rank == guilty:
            at_step(5, method, stuck)

    save = tmp_path / "save"
    job = start(settings(rows, save, parallel__distributed_timeout_minutes=HANG_MINUTES), 2, sabotage)
    codes = job.wait(60 * (1 + 2 * HANG_MINUTES))
    log = job.log()
    assert HUNG in codes and 0 not in codes, log
    assert f"rank {guilty} holds up the others at step 5, {phase}: " in log, log
    assert f"{__file__.rpartition('/')[2]}:" in log.partition("holds up the others")[2].splitlines()[0], "where"
    assert f"rank {1 - guilty} waits for others at step 5" in log, log
    again = run(settings(rows, save), 2)
    assert set(again.codes.values()) == {0}, again.log()
    assert_same(save, reference(2))


def test_stopped_rank_does_not_answer_and_is_named(rows, tmp_path):
    """As a process that the kernel does not run any more: its own watchdog is silent too."""

    def sabotage(rank: int) -> None:
        if rank == 1:
            at_step(5, "_next_batch", lambda trainer: os.kill(os.getpid(), signal.SIGSTOP))

    job = start(settings(rows, tmp_path / "save", parallel__distributed_timeout_minutes=HANG_MINUTES), 2, sabotage)
    job.wait_until(lambda: job.poll() or 0 in job.codes, 60 * (1 + 2 * HANG_MINUTES), "the end of rank 0")
    job.end()
    assert job.codes[0] == HUNG, job.log()
    assert "rank 1 does not answer" in job.log()
    assert "rank 0 waits for others at step 5" in job.log()


def test_a_busy_run_is_not_taken_for_a_hung_one(rows, reference, tmp_path):
    """Each step takes a third of the time limit, all steps together several of them."""

    def sabotage(rank: int) -> None:
        from megatron_moellava.training.loop import Trainer

        real = Trainer._next_batch
        Trainer._next_batch = lambda self: (time.sleep(0.4), real(self))[1]

    save = tmp_path / "save"
    job = run(settings(rows, save, parallel__distributed_timeout_minutes=0.04 * PATIENCE), 2, sabotage)
    assert set(job.codes.values()) == {0}, job.log()
    assert_same(save, reference(2))


def poison_weight(trainer) -> None:
    with torch.no_grad():
        trainer.chunks[0].projector.linear_fc2.weight[0, 0] = float("nan")


def poison_gradient(trainer) -> None:
    """As by a faulty backward pass: the losses of all ranks are good."""
    handle = trainer.chunks[0].projector.linear_fc2.weight.register_hook(
        lambda grad: handle.remove() or grad * float("nan")
    )


@pytest.mark.parametrize(("poison", "what"), [(poison_weight, "loss"), (poison_gradient, "gradient")])
def test_nan_of_one_rank_is_named_with_its_samples(poison, what, rows, tmp_path):
    def sabotage(rank: int) -> None:
        if rank == 1:
            at_step(3, "_forward_backward", poison)

    save = tmp_path / "save"
    run(settings(rows, save, training__train_steps=3, training__non_finite_patience=9), 2, sabotage)
    job_log = (tmp_path / "save-logs/rank1.log").read_text()
    (line,) = [line for line in job_log.splitlines() if "step 3 skipped" in line]
    assert f"the {what} of rank 1 is not finite" in line
    third = records(save)[2]
    assert third["skipped"] == 1.0
    named = line.rpartition("samples: ")[2].split(", ")
    assert named == third["sample_ids"][len(third["sample_ids"]) // 2 :], "rank 1 has the second half"


def test_slow_rank_is_reported(rows, reference, tmp_path):
    def sabotage(rank: int) -> None:
        from megatron_moellava.training.loop import Trainer

        real = Trainer._forward_step
        if rank == 0:
            Trainer._forward_step = lambda self, *a, **k: (time.sleep(0.5 * PATIENCE), real(self, *a, **k))[1]

    save = tmp_path / "save"
    job = run(settings(rows, save, logging__straggler_interval=2), 2, sabotage)
    assert set(job.codes.values()) == {0}, job.log()
    assert "rank 0 is slow: " in job.log() and "rank 1 is slow" not in job.log()
    measured = [step for step in records(save) if "slowest_rank" in step]
    assert [step["iteration"] for step in measured] == [2, 4, 6, 8, 10, 12]
    assert all(step["slowest_rank"] == 0 and step["slowest_rank_ratio"] > 1.3 for step in measured)
    assert_same(save, reference(2))


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def test_crashed_loader_worker_ends_the_run_soon_and_nothing_is_lost(rows, reference, tmp_path):
    save = tmp_path / "save"
    tree = settings(rows, save, data__num_workers=1)
    job = start(tree | {"training": tree["training"] | {"train_steps": 500}}, 2)
    job.wait_for_checkpoint(2)
    killed = time.monotonic()
    for worker in children(job.pids[1]):
        os.kill(worker, signal.SIGKILL)
    codes = job.wait(60)
    assert 0 not in codes and 2 not in codes, (codes, job.log())
    assert time.monotonic() - killed < 60 * PATIENCE
    assert "the data loader of data-parallel rank 1 failed" in job.log()
    assert newest_step(save) >= 2


def test_exhausted_shared_memory_is_named_with_the_way_out(rows, tmp_path):
    """A container with a /dev/shm of 64 KiB, which this rank sees and nobody else."""

    def sabotage(rank: int) -> None:
        os.unshare(os.CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)
        ctypes.CDLL(None).sync()

    job = run(settings(rows, tmp_path / "save", data__num_workers=1), 1, sabotage)
    assert set(job.codes.values()) == {1}, job.log()
    assert "/dev/shm" in job.log() and "--shm-size=16g" in job.log() and "data.num_workers=0" in job.log()
