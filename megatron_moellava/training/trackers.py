"""Weights & Biases, MLflow and SwanLab beside TensorBoard: one small interface, and no package of theirs unless asked for.

A run has one entry with each tracker for all its life: the id is kept in `trackers.json` in the folder of the log, so a run
that goes on continues its curves. Steps that are trained again after an interruption are written again, with the same
numbers. With `logging.offline` everything stays in the folder (`wandb/`, `mlruns/`, `swanlog/`), for the trackers' own `sync`.

A tracker that fails (no network, not logged in) is dropped with a line in the log: a log is not worth a run.
"""

import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron_moellava.checkpoint.folders import write_durably
from megatron_moellava.config import LoggingConfig, Tracker

IDS = "trackers.json"
_PARAMETER_LENGTH = 500  # characters that every MLflow server takes of a parameter's value


class Writer(Protocol):
    """Takes the numbers of a run."""

    id: str  # of the run's entry

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Numbers of a step, by name (`train/loss`)."""

    def close(self, finished: bool) -> None:
        """Nothing more comes; `finished`: the run has reached its end."""


class WandB:
    """Weights & Biases. Its own step may only grow, so the run's is a number beside the others, and the x axis."""

    def __init__(self, options: LoggingConfig, folder: Path, name: str, known: str | None, record: dict):
        import wandb

        self.id = known or secrets.token_hex(4)
        self.run = wandb.init(
            project=options.project,
            name=name,
            id=self.id,
            resume="allow",
            dir=str(folder),
            mode="offline" if options.offline else None,
            config=record,
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        self.run.define_metric("*", step_metric="iteration")

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        self.run.log({"iteration": iteration, **values})

    def close(self, finished: bool) -> None:
        """Send what is left, and say how the run ended."""
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, or files in the folder."""

    def __init__(self, options: LoggingConfig, folder: Path, name: str, known: str | None, record: dict):
        if options.offline:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3 wants to be told
        import mlflow

        self.client = mlflow.MlflowClient(tracking_uri=(folder / "mlruns").as_uri() if options.offline else None)
        if known is None:
            found = self.client.get_experiment_by_name(options.project)
            experiment = found.experiment_id if found else self.client.create_experiment(options.project)
            self.id = self.client.create_run(experiment, run_name=name).info.run_id
            flat = _flat(record["run"])
            params = [mlflow.entities.Param(key, str(value)[:_PARAMETER_LENGTH]) for key, value in flat.items()]
            for first in range(0, len(params), 100):  # as many as a request may have
                self.client.log_batch(self.id, params=params[first : first + 100])
        else:
            self.id = known
            self.client.update_run(known, "RUNNING")
        self.client.log_dict(self.id, record, f"record_{time.strftime('%Y%m%d_%H%M%S')}.json")
        self._metric = mlflow.entities.Metric

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, iteration) for name, value in values.items()]
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.id, metrics=metrics[first : first + 1000])

    def close(self, finished: bool) -> None:
        """Say how the run ended."""
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class SwanLab:
    """SwanLab: its cloud, or files in the folder."""

    def __init__(self, options: LoggingConfig, folder: Path, name: str, known: str | None, record: dict):
        import swanlab

        self.id = known or secrets.token_hex(10)
        self.run = swanlab.init(
            project=options.project,
            name=name,
            id=self.id,
            resume="allow",
            log_dir=str(folder / "swanlog"),
            mode="offline" if options.offline else None,
            config=record,
        )

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Numbers of a step."""
        self.run.log(values, step=iteration)

    def close(self, finished: bool) -> None:
        """Send what is left, and say how the run ended."""
        self.run.finish(**({} if finished else {"state": "aborted"}))


TRACKERS: dict[Tracker, type[Writer]] = {"wandb": WandB, "mlflow": MLflow, "swanlab": SwanLab}


class Trackers:
    """Those that the run asks for, on the process that logs."""

    def __init__(self, options: LoggingConfig, folder: Path, record: dict, say: Callable[[str], None]):
        self.say = say
        self.writers: dict[Tracker, Writer] = {}
        ids, name = _read(folder / IDS), options.run_name or folder.absolute().name
        for kind in options.trackers:
            writer = self._guarded(kind, TRACKERS[kind], options, folder, name, ids.get(kind), record)
            if writer is not None:
                self.writers[kind] = writer
                ids[kind] = writer.id
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / IDS, json.dumps(ids).encode())

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Numbers of a step, to each of them."""
        for kind, writer in list(self.writers.items()):
            self._guarded(kind, writer.scalars, iteration, values)

    def close(self, finished: bool) -> None:
        """Nothing more comes."""
        for kind, writer in list(self.writers.items()):
            self._guarded(kind, writer.close, finished)

    def _guarded(self, kind: Tracker, act: Callable, *arguments):
        """What `act` returns. Whatever a tracker raises ends it alone: each package has errors of its own."""
        try:
            return act(*arguments)
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            self.writers.pop(kind, None)
            self.say(f"cannot write to {kind} ({reason}); training goes on without it")
            return None


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """Nested plain data by dotted path."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
