"""Small data sets train, or the run says why not: with the numbers, before or while it does."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.config import (
    CheckpointConfig,
    ConfigError,
    DataError,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_moellava.training.run import train
from tests.helpers.data_files import ASSETS, config, make_set, row, write_images, write_rows


def run_of(path: Path, save: Path | None = None, *, data=None, optimizer=None, **training) -> RunConfig:
    base = {"stage": 2, "precision": "fp32", "device": "cpu", "global_batch_size": 4, "train_steps": 0}
    return RunConfig(
        model=ModelConfig(backbone="llama-tiny", tower=str(ASSETS / "openai/clip-tiny")),
        data=config(path, tokenizer=str(ASSETS / "tok_bpe"), **{"packing": False} | (data or {})),
        training=TrainingConfig(**base | training),
        optimizer=OptimizerConfig(**{"lr": 1e-3} | (optimizer or {})),
        checkpoint=CheckpointConfig(save=str(save) if save else None, save_interval=1000),
        logging=LoggingConfig(tensorboard=False, sample_ids=True, straggler_interval=0),
    )


def trained(folder: Path) -> list[list[str]]:
    return [json.loads(line)["sample_ids"] for line in (folder / "steps.jsonl").read_text().splitlines()]


SHORT = {  # rows, batch, steps, share of warm-up -> (error, note)
    "an epoch of a step": (4, 4, 0, 0.0, None, None),
    "an epoch shorter than a step": (3, 4, 0, 0.0, "fills 3 rows, fewer than one step of .*=4: .* 1.3 times", None),
    "an epoch much shorter": (2, 64, 0, 0.0, "2 rows, .*=64: each row would be trained 32.0 times", None),
    "steps of many epochs": (2, 4, 3, 0.0, None, "takes each of the 2 rows 2.0 times; 3 steps are 6.0 epochs"),
    "one step of warm-up": (4, 4, 1, 0.03, "only step one of warm-up, which begins at a learning rate of 0", None),
    "an epoch of one step of warm-up": (4, 4, 0, 0.03, "only step one of warm-up", None),
    "two steps": (4, 4, 2, 0.03, None, None),
    "nothing but warm-up": (4, 4, 2, 1.0, None, "all 2 steps are warm-up .* reaches 0.50 of optimizer.lr=0.001"),
}


@pytest.mark.parametrize("case", SHORT)
@pytest.mark.parametrize("packing", [False, True])
def test_short_runs_are_trained_refused_or_noted(tmp_path, capfd, case, packing):
    """A packed row holds one of these samples."""
    rows, batch, steps, warmup, error, note = SHORT[case]
    path = write_rows(tmp_path, [row(7, None, id=f"id{i}") for i in range(rows)])
    run = run_of(
        path,
        tmp_path / "run",
        data={"packing": packing, "seq_length": 128},
        optimizer={"lr_warmup_fraction": warmup},
        global_batch_size=batch,
        train_steps=steps,
    )
    if error:
        with pytest.raises(ConfigError, match=error):
            train(run)
        return
    assert train(run) == 0
    out = capfd.readouterr().out
    if note:
        assert any(re.search(note, line) for line in out.splitlines())
    else:
        assert "note: " not in out
    records = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert any(record["lr"] > 0 for record in records)
    samples = len(records) * batch
    assert f"trained {samples} samples, {samples / rows:.2f} epochs of {rows}; read {samples}, skipped 0" in out


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_trains_every_sample_once(tmp_path, packing):
    path = make_set(tmp_path, 22)
    assert train(run_of(path, tmp_path / "run", data={"packing": packing}, global_batch_size=2)) == 0
    seen = Counter(name for step in trained(tmp_path / "run") for name in step)
    assert len(seen) == 22 and seen.total() - 22 <= 4


def test_a_step_without_any_gradient_says_so(tmp_path, capfd):
    path = write_rows(tmp_path, [row(i, None) for i in range(8)])
    run = run_of(path, stage=1, train_steps=2, optimizer={"lr_warmup_fraction": 0.0})
    try:
        train(run)
        said = capfd.readouterr().out
    except ConfigError as error:  # stopped at its first step
        said = str(error)
    assert "gradient" in said and ("exactly 0" in said or "no gradient" in said)


@pytest.mark.parametrize("packing", [False, True])
def test_bad_data_end_a_run_after_a_checkpoint_and_repaired_ones_continue_it(tmp_path, packing):
    """Row 25 is not among those that the check before the run looks at."""
    write_images(tmp_path)
    path = write_rows(tmp_path, [row(i, "late.png" if i == 25 else "a.png") for i in range(30)])
    run = run_of(path, tmp_path / "run", data={"packing": packing}, global_batch_size=2)
    with pytest.raises(DataError, match=r"rows.json row 25, image 'late.png': no such file"):
        train(run)
    before = trained(tmp_path / "run")
    assert before and newest_checkpoint(tmp_path / "run").name == f"iter_{len(before):07}"
    write_images(tmp_path, ("late.png",))
    assert train(run) == 0
    seen = Counter(name for step in trained(tmp_path / "run") for name in step)
    assert len(seen) == 30 and set(seen.values()) <= {1, 2} and seen["id25"] >= 1


def test_more_bad_rows_than_tolerated_name_the_share(tmp_path):
    path = write_rows(tmp_path, [row(i, "gone.png" if i % 3 == 0 else None) for i in range(12)])
    run = run_of(path, tmp_path / "run", data={"max_skip_share": 0.25}, global_batch_size=2)
    with pytest.raises(DataError, match=r"4 of the 12 rows are bad, more than data.max_skip_share allows"):
        train(run)
    assert train(replace(run, data=replace(run.data, max_skip_share=0.34))) == 0


def written_precision(folder: Path) -> str:
    return read_description(newest_checkpoint(folder)).config["training"]["precision"]


def test_a_run_writes_the_precision_that_auto_stood_for_and_goes_on_in_it_elsewhere(tmp_path, capfd, avx2, monkeypatch):
    """The second part of the run finds a processor that may not use what the first one had, or the other way round."""
    path = write_rows(tmp_path, [row(7, None, id=f"id{i}") for i in range(8)])
    first = run_of(path, tmp_path / "run", precision="auto", train_steps=2)
    assert train(first) == 0
    assert written_precision(tmp_path / "run") == "fp32"
    assert "precision fp32: " in capfd.readouterr().out
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert train(replace(first, training=replace(first.training, train_steps=3))) == 0
    said = capfd.readouterr().out
    assert "precision fp32: iter_0000002 goes on in it" in said and "training.precision" not in said
    assert written_precision(tmp_path / "run") == "fp32"


def test_a_run_may_go_on_in_another_precision_if_it_names_it(tmp_path, capfd):
    path = write_rows(tmp_path, [row(7, None, id=f"id{i}") for i in range(8)])
    assert train(run_of(path, tmp_path / "run", train_steps=2)) == 0
    assert train(run_of(path, tmp_path / "run", precision="bf16", train_steps=3)) == 0
    assert "goes on with another value: training.precision=fp32 then, bf16 now" in capfd.readouterr().out
    assert written_precision(tmp_path / "run") == "bf16"
