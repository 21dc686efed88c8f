"""Real training runs that start in a second: the test process imports everything once and forks each rank.

A rank is tools/train.py's own main() in a process of its own, with torchrun's variables and a log file. `sabotage` runs in
it first and may break something there; everything else is what a user gets.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import megatron_moellava.training.run  # noqa: F401  every rank needs it; imported once
from megatron_moellava.commands import train
from tests.helpers.paths import REPO

ASSETS = REPO / "tests/golden/assets"
STEPS, GLOBAL_BATCH, SAVE_INTERVAL = 12, 4, 2
SAME = ("loss", "grad_norm", "lr", "load_balancing_loss", "samples", "sample_ids")
PATIENCE = float(os.environ.get("PATIENCE", "1"))  # a factor on every time limit, for a busy machine


def settings(rows: Path, save: Path, **changes) -> dict:
    """A stage-3 run of a tiny model on rows with and without images, one epoch; `section__field=value` changes it."""
    tree = {
        "model": {"backbone": "phi-2-tiny", "tower": str(ASSETS / "openai/clip-tiny")},
        "moe": {"num_moe_experts": 2, "placement": "second_half"},
        "data": {
            "sources": [{"path": str(rows), "image_folder": str(rows.parent)}],
            "tokenizer": str(ASSETS / "tok_bpe"),
            "template": "phi",
            "seq_length": 160,
            "packing": False,
            "num_workers": 0,
        },
        "training": {
            "stage": 3,
            "precision": "fp32",
            "device": "cpu",
            "train_steps": STEPS,
            "global_batch_size": GLOBAL_BATCH,
        },
        "optimizer": {"lr": 1e-3},
        "parallel": {"distributed_timeout_minutes": 1},
        "checkpoint": {"save": str(save), "save_interval": SAVE_INTERVAL},
        "logging": {"tensorboard": False, "sample_ids": True, "straggler_interval": 0, "routing_interval": 3},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    return tree


@dataclass
class Job:
    """The ranks of one attempt."""

    save: Path
    folder: Path  # logs
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)  # rank -> exit code, -9 for a rank that was killed

    def poll(self) -> bool:
        """Collect what has ended; True when nothing runs any more."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ranks is None or rank in ranks):
                os.kill(pid, number)

    def wait(self, seconds: float = 120, moment: float = 30) -> list[int]:
        """Exit codes by rank. When one rank has failed, the others get a moment and are then ended, as torchrun does."""
        self.wait_until(lambda: self.poll() or any(code for code in self.codes.values()), seconds, "an end")
        deadline = time.monotonic() + moment * PATIENCE
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.end()
        return [self.codes[rank] for rank in range(len(self.pids))]

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds * PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"{what}: not within {seconds * PATIENCE:g} s\n{self.log()}")
            time.sleep(0.005)

    def wait_for_step(self, step: int, seconds: float = 60) -> None:
        self.wait_until(lambda: self.poll() or len(records(self.save)) >= step, seconds, f"step {step}")

    def wait_for_checkpoint(self, step: int, seconds: float = 60) -> None:
        self.wait_until(lambda: self.poll() or newest_step(self.save) >= step, seconds, f"checkpoint {step}")

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        while not self.poll():
            time.sleep(0.005)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("rank*.log")))


def start(tree: dict, world: int, sabotage: Callable[[int], None] | None = None, logs: Path | None = None) -> Job:
    """`logs`: beside the checkpoints if not given."""
    save = Path(tree["checkpoint"]["save"])
    folder = logs or save.with_name(f"{save.name}-logs")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    port = _free_port()
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _rank(rank, world, port, config, folder / f"rank{rank}.log", sabotage)
        pids.append(pid)
    return Job(save=save, folder=folder, pids=pids)


def _rank(rank: int, world: int, port: int, config: Path, log: Path, sabotage) -> None:
    """The forked process, to its end."""
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
        sys.argv = ["train.py", "--config", str(config)]
        if sabotage is not None:
            sabotage(rank)
        code = train.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as item:
        item.bind(("127.0.0.1", 0))
        return item.getsockname()[1]


def run(tree: dict, world: int, sabotage=None, logs: Path | None = None) -> Job:
    """A whole attempt, from start to end."""
    job = start(tree, world, sabotage, logs)
    job.wait()
    return job


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def records(save: Path, name: str = "steps.jsonl") -> list[dict]:
    """The complete lines of the step log, or of another."""
    path = save / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest_step(save: Path) -> int:
    path = save / "latest_checkpointed_iteration.txt"
    return int(path.read_text() or 0) if path.exists() else 0


def unfinished(save: Path) -> bool:
    """Has a save begun that has not ended?"""
    return any(save.glob("iter_*.tmp"))


def assert_same(save: Path, reference: Path) -> None:
    """Every step once, with the reference's numbers and samples bit by bit; the same weights, moments and generators."""
    here, there = records(save), records(reference)
    assert [step["iteration"] for step in here] == [step["iteration"] for step in there]
    for mine, other in zip(here, there, strict=True):
        for name in SAME:
            assert mine[name] == other[name], (mine["iteration"], name)
    assert records(save, "routing.jsonl") == records(reference, "routing.jsonl")
    assert digests(save) == digests(reference)


def digests(save: Path) -> dict[str, str]:
    """SHA-256 of tensors and generators in the last checkpoint (.metadata and the loader's state hold times and paths)."""
    files = json.loads((last_checkpoint(save) / "run.json").read_text())["sha256"]
    return {name: digest for name, digest in files.items() if name.endswith(".distcp") or "generators" in name}


def last_checkpoint(save: Path) -> Path:
    return save / f"iter_{newest_step(save):07d}"
