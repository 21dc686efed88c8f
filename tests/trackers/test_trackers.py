"""The real packages, offline: what a run and its continuation write is read back and compared with steps.jsonl.

`make test-trackers` has an environment with them; nothing leaves the machine.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moellava import parallel, platform
from megatron_moellava.config import LoggingConfig, ParallelConfig
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.trackers import IDS
from tests.unit.training.test_loop import Rows, run_in, steps_of

BLOCK = 1 << 15
KINDS = ("wandb", "mlflow", "swanlab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two steps, and then a longer run that goes on to four."""
    for kind in KINDS:
        pytest.importorskip(kind, reason=f"{kind} is not installed: make test-trackers")
    folder = tmp_path_factory.mktemp("tracked")
    parallel.initialize(ParallelConfig(), 1)
    for steps in (2, 4):
        run = run_in(folder, train_steps=steps)
        log = LoggingConfig(tensorboard=False, routing_interval=2, trackers=KINDS, project="tests", offline=True)
        platform.seed_everything(1)
        trainer = Trainer(replace(run, logging=log), Rows(), steps)
        assert trainer.train() == 0
    parallel.shutdown()
    return folder


def log_records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format (blocks of 32 KiB; CRC, length, kind) behind a header of 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def losses(folder: Path) -> dict[int, float]:
    return {step["iteration"]: step["loss"] for step in steps_of(folder)}


def test_nothing_failed_and_each_has_one_id(folder):
    ids = json.loads((folder / IDS).read_text())
    assert sorted(ids) == sorted(KINDS)
    assert len(list((folder / "wandb").glob(f"offline-run-*-{ids['wandb']}"))) == 2
    assert len(list((folder / "swanlog").glob(f"run-*-{ids['swanlab']}"))) == 2
    assert len(list((folder / "mlruns").glob(f"*/{ids['mlflow']}"))) == 1


def test_mlflow_has_one_curve_with_settings_and_record(folder):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    run_id = json.loads((folder / IDS).read_text())["mlflow"]
    history = client.get_metric_history(run_id, "train/loss")
    assert {point.step: point.value for point in history} == pytest.approx(losses(folder))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["training.stage"] == "3"
    assert any(name.startswith("routing/layer0/") for name in run.data.metrics)
    names = [item.path for item in client.list_artifacts(run_id)]
    record = json.loads(Path(client.download_artifacts(run_id, names[0])).read_text())
    assert record["costs"]["parameters"] > record["costs"]["activated_parameters"] > 0
    assert record["environment"]["packages"]["megatron-core"] and record["run"]["optimizer"]["lr"] == 1e-3
    assert record["git"] is None or len(record["git"]["commit"]) == 40


def test_wandb_has_every_step_under_its_own_number(folder):
    from wandb.proto import wandb_internal_pb2

    found, config = {}, {}
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in log_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            if "train/loss" in values:
                found[values["iteration"]] = values["train/loss"]
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert found == pytest.approx(losses(folder))
    assert config["run"]["training"]["stage"] == 3 and config["costs"]["parameters"] > 0


def test_swanlab_has_the_settings_and_the_numbers(folder):
    first, second = sorted((folder / "swanlog").glob("run-*"))
    assert "costs" in (first / "files/config.yaml").read_text()
    for path in (first, second):
        (data,) = path.glob("*.swanlab")
        assert b"train/loss" in data.read_bytes()
