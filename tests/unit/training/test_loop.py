"""The trainer on a tiny model: its steps, its log, its end. Layouts and interruptions are in tests/distributed."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.checkpoint.folders import TRACKER
from megatron_moellava.compiled import compile_elementwise
from megatron_moellava.config import (
    CheckpointConfig,
    CheckpointError,
    ConfigError,
    DataConfig,
    LoggingConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Source,
)
from megatron_moellava.data.loader import Batches
from megatron_moellava.exit_codes import INTERRUPTED
from megatron_moellava.machine import COMPILER
from megatron_moellava.training.loop import Trainer, TrainingDiverged, global_token_mean
from tests.helpers.batches import X, padded
from tests.helpers.inference_models import tiny_run


class Rows(Batches):
    """One row again and again, with something to do when so many have been read."""

    def __init__(self):
        self.read, self.at = 0, {}

    def __next__(self):
        self.read += 1
        self.at.get(self.read, lambda *_: None)(signal.SIGTERM, None)
        return padded([[5, 6, 7, 8, 9, 10, 11, 12]], [[6, 7, 8, 9, 10, 11, 12, X]], ["color"])

    def state_dict(self):
        return {"read": self.read}

    def load_states(self, states):
        (self.read,) = (state["read"] for state in states.values())

    def counters(self):
        counted = {"seen": self.read, "trained": self.read, "skipped": {}, "notes": {}}
        return counted | {"bad_epoch": 0, "bad": [], "duplicates": 0, "epoch": 1}


def run_in(folder, **training):
    run = tiny_run(MoEConfig())
    return replace(
        run,
        data=DataConfig(sources=(Source(path="x"),), tokenizer="x", template="v1", packing=False, seq_length=8),
        training=replace(run.training, **{"global_batch_size": 2, "micro_batch_size": 1, "train_steps": 4} | training),
        optimizer=OptimizerConfig(lr=1e-3),
        checkpoint=CheckpointConfig(save=str(folder), save_interval=2),
        logging=LoggingConfig(tensorboard=False, log_interval=1, routing_interval=2),
    )


def steps_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_loss_is_the_sum_over_tokens_and_scaled_for_the_schedule():
    losses_BS = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    scaled, total = global_token_mean(losses_BS, scale=0.5)
    assert (float(scaled), float(total)) == (3.0, 6.0)
    assert scaled.requires_grad and not total.requires_grad


def test_a_run_learns_logs_every_step_and_ends_with_a_checkpoint(world, tmp_path, capsys):
    rows = Rows()
    trainer = Trainer(run_in(tmp_path), rows, 4)
    assert trainer.train() == 0
    steps = steps_of(tmp_path)
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(step["samples"] == 0 and step["skipped"] == 0.0 for step in steps)  # these rows have no ids
    assert rows.read == 8, "two micro-batches a step"
    assert (tmp_path / "iter_0000004/run.json").exists()
    assert "stage 3 step 4/4" in capsys.readouterr().out
    routing = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in routing] == [2, 4]
    assert sum(routing[0]["layers"][0]["choices"]) == 2 * 2 * 8  # rows, choices, positions


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"torch.compile needs a C++ compiler ({COMPILER})")
def test_a_compiled_run_learns_the_same_and_says_so(world, tmp_path, monkeypatch, capsys):
    made: dict = {}
    monkeypatch.setattr("megatron_moellava.compiled._made", made)
    losses = {}
    try:
        for on in (False, True):
            continued(run_in(tmp_path / str(on), compile=on)).train()
            losses[on] = [step["loss"] for step in steps_of(tmp_path / str(on))]
            assert bool(made) == on == ("training.compile" in capsys.readouterr().out)
    finally:
        compile_elementwise(False)
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert {"scaled_to_one", "turned", "activated", "activated_gradients", "swiglu"} <= {f.__name__ for f in made}


def test_an_interrupted_run_continues_as_if_it_had_not_stopped(world, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    Trainer(run_in(whole), Rows(), 4).train()
    parallel.initialize(ParallelConfig(), seed=1)
    first = Trainer(run_in(halves), Rows(), 4)
    first.loader.at = {4: first._on_signal}
    assert first.train() == INTERRUPTED
    rows = Rows()
    continued = Trainer(run_in(halves), rows, 4)
    assert continued.state.iteration == 2 and rows.read == 4
    assert continued.train() == 0
    for name in ("loss", "grad_norm", "lr"):
        assert [step[name] for step in steps_of(halves)] == pytest.approx([step[name] for step in steps_of(whole)])


def test_a_checkpoint_of_another_stage_is_not_continued(world, tmp_path):
    Trainer(run_in(tmp_path), Rows(), 1).train()
    with pytest.raises(CheckpointError, match="holds a checkpoint of stage 3 that cannot be continued as stage 2"):
        Trainer(run_in(tmp_path, stage=2), Rows(), 1)


def numbers_of(folder) -> list[tuple]:
    return [tuple(step[name] for name in ("iteration", "loss", "grad_norm", "lr")) for step in steps_of(folder)]


def continued(run: RunConfig, steps: int = 4) -> Trainer:
    """In the state in which a new process is."""
    parallel.initialize(ParallelConfig(), seed=1)
    return Trainer(run, Rows(), steps)


def test_what_a_resume_may_change_freely_changes_no_bit(world, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    continued(run_in(whole)).train()
    first = continued(run_in(halves))
    first.loader.at = {4: first._on_signal}
    assert first.train() == INTERRUPTED
    moved = halves.rename(tmp_path / "moved")
    run = run_in(moved, non_finite_patience=9)
    run = replace(
        run,
        data=replace(run.data, num_workers=7, max_skip_share=0.5),
        parallel=ParallelConfig(distributed_timeout_minutes=3.0),
        optimizer=replace(run.optimizer, overlap_grad_reduce=False),
        checkpoint=CheckpointConfig(
            save=str(moved), load=str(tmp_path / "gone"), save_interval=1, keep=5, async_save=True
        ),
        logging=replace(run.logging, straggler_interval=0),
    )
    assert continued(run).train() == 0
    assert numbers_of(moved) == numbers_of(whole)


@pytest.fixture
def finished(world, tmp_path):
    """A run of four steps that keeps the checkpoints of steps 2 and 4."""
    continued(run_in(tmp_path)).train()
    return tmp_path


def back(folder, **checkpoint) -> RunConfig:
    run = run_in(folder)
    return replace(run, checkpoint=replace(run.checkpoint, **checkpoint))


def test_a_run_goes_on_from_an_older_step_and_sets_the_newer_aside(finished, capsys):
    before = numbers_of(finished)
    trainer = continued(back(finished, ckpt_step=2))
    assert trainer.state.iteration == 2 and trainer.loader.read == 4
    assert "iter_0000004 set aside as *.superseded" in capsys.readouterr().out
    assert (finished / "iter_0000004.superseded/run.json").exists() and not (finished / "iter_0000004").exists()
    assert (finished / TRACKER).read_text() == "2\n"
    assert trainer.train() == 0
    assert numbers_of(finished) == before, "the same run again"
    assert continued(back(finished, ckpt_step=2)).state.iteration == 4, "the same command after its end"
    (finished / TRACKER).write_text("2")
    assert continued(run_in(finished)).state.iteration == 2
    assert (finished / "iter_0000004.superseded.1").exists(), "and the one from before is still there"


def test_a_damaged_step_that_was_asked_for_is_not_replaced(finished):
    (finished / "iter_0000002/ranks/data_00000.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"checkpoint.ckpt_step=2: .*data_00000.pt.*choose another step"):
        continued(back(finished, ckpt_step=2))
    assert (finished / "iter_0000002").exists() and (finished / "iter_0000004").exists()


def test_a_longer_schedule_says_what_the_learning_rate_does(finished, capsys):
    trainer = continued(run_in(finished, train_steps=8), 8)
    said = capsys.readouterr().out
    assert "goes on with another value: training.train_steps=4 then, 8 now (the schedule's length)" in said
    trainer.train()
    rate = steps_of(finished)[4]["lr"]
    assert rate > 1e-4
    assert f"the learning rate of step 5 is {rate:.3g}, by the schedule of this run (8 steps" in said
    assert "by the one before (4 steps) it was 0\n" in said
    capsys.readouterr()
    continued(run_in(finished, train_steps=8), 8)
    assert "note:" not in capsys.readouterr().out, "the same command says nothing"
    continued(run_in(finished, train_steps=2), 2)
    assert "8 steps are done, more than the 2 of this run" in capsys.readouterr().out


def test_another_run_is_refused_before_a_weight_is_read(finished):
    with pytest.raises(ConfigError, match=r"training.global_batch_size=2 then, 4 now .*training.seed=42 then, 1 now"):
        continued(run_in(finished, global_batch_size=4, seed=1))


def test_a_run_that_diverges_stops_with_its_samples(world, tmp_path, capsys):
    trainer = Trainer(run_in(tmp_path, non_finite_patience=2), Rows(), 4)
    with torch.no_grad():
        trainer.chunks[0].language_model.embedding.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="2 steps in a row without a finite gradient"):
        trainer.train()
    assert "step 1 skipped: the loss of rank 0 is not finite" in capsys.readouterr().out
    assert [step["skipped"] for step in steps_of(tmp_path)] == [1.0, 1.0]
