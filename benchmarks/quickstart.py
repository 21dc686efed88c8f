"""The quickstart's steps on a CPU with bf16 units and on one that is held to AVX2, in CPU time of one thread.

  python -m benchmarks.quickstart [--steps 8]

Each capability is a process of its own, since torch and oneDNN read it once. Milliseconds of a stage-2 and a stage-3 step
of one row, of those of the small model that learns names, of asking 100 questions, of a step of the tower's pretraining, and of
a pass of the probe by which run.py says how long it will take; each also in passes. `bf16 over fp32`: a stage-2 step in bf16
where `auto` takes fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import finish, say

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
CAPABILITIES: dict[str, dict[str, str]] = {
    "all that the processor has": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
QUESTIONS = 100
WARM_UP = 2
STAGES = {"dense": "stage2", "moe": "stage3", "names dense": "names", "names moe": "names_moe"}  # -> run of plans.py
QUIET = ("logging.tensorboard=false", "logging.log_interval=100000")


def milliseconds(action: Callable[[], object], rounds: int) -> float:
    """CPU time of this thread's process for each of `rounds` calls, after WARM_UP others."""
    for _ in range(WARM_UP):
        action()
    started = time.process_time()
    for _ in range(rounds):
        action()
    return 1000 * (time.process_time() - started) / rounds


def trainer_of(data: Path, plan: dict, precision: str):
    from megatron_moellava.model.precision import settled
    from megatron_moellava.training.run import build_trainer
    from megatron_moellava.validation.run import load_run

    (file,) = plan["data"]
    flags = {
        "model.backbone": plan.get("backbone", "llama-tiny"),
        "training.stage": plan["stage"],
        "training.train_steps": 1000,
        "training.global_batch_size": 1,
        "training.precision": precision,
        "data.sources": [{"path": str(data / file), "image_folder": str(data / "images")}],
        "data.tokenizer": str(data / "tokenizer.model"),
    }
    experts = {"moe.num_moe_experts": 4} | {f"moe.{key}": value for key, value in plan.get("moe", {}).items()}
    flags |= experts if plan["stage"] == 3 else {}
    flags |= {"data.seq_length": plan["seq_length"]} if "seq_length" in plan else {}
    run = settled(load_run(config=str(QUICKSTART / "quickstart.yaml"), flags=flags, overrides=QUIET)).run
    trainer = build_trainer(run)
    for wrapped in trainer.wrapped:
        wrapped.train()
    return trainer


def measure_stage(data: Path, plan: dict, precision: str, steps: int, questions: list[dict]) -> dict:
    from megatron_moellava.experiments.stage import ask_closed

    trainer = trainer_of(data, plan, precision)
    found = {"step": milliseconds(trainer.step, steps)}
    if questions:
        asked = lambda: ask_closed(trainer, trainer.run, questions, data / "images")  # noqa: E731
        found["questions"] = milliseconds(asked, 2)
    return found | {"precision": trainer.run.training.precision}


def measure_tower(data: Path, steps: int) -> float:
    from models import Pretraining, load_captions
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from megatron_moellava.towers import get_tower
    from megatron_moellava.towers.from_config import hf_config_of

    tower = get_tower("clip-tiny")
    config = hf_config_of(tower) | {"num_hidden_layers": tower.num_used_layers}
    config.pop("model_type", None)
    pixels_NCHW, words_NW = load_captions(data / "captions.json", data / "images", tower, limit=500)
    pretraining = Pretraining(CLIPVisionModel(CLIPVisionConfig(**config)), tower, words_NW, 1, 1000)
    return milliseconds(lambda: pretraining.train(pixels_NCHW), steps)


def work(data: Path, steps: int) -> dict:
    """What one capability's process measures."""
    from plans import PLANS
    from speed import seconds_of_a_pass

    from megatron_moellava import parallel
    from megatron_moellava.config import ParallelConfig

    parallel.initialize(ParallelConfig(), 1)
    with (data / "test.jsonl").open() as file:
        questions = [json.loads(next(file)) for _ in range(QUESTIONS)]
    stages = {}
    for name, run in STAGES.items():
        asked = questions if name in ("dense", "moe") else []
        stages[name] = measure_stage(data, PLANS["names"][run], "auto", steps, asked)
    (precision,) = {stage.pop("precision") for stage in stages.values()}
    found = {"precision": precision, **stages, "tower step": measure_tower(data, steps)}
    found["probe"] = 1000 * seconds_of_a_pass(precision, time.process_time)
    if precision == "fp32":
        slow = measure_stage(data, PLANS["names"]["stage2"], "bf16", 2, [])["step"]
        found["bf16 over fp32"] = slow / found["dense"]["step"]
    parallel.shutdown()
    return found


def in_passes(found: dict) -> dict:
    """The figures of one capability in passes of its probe."""
    probe = found["probe"]
    of_stages = {name: {key: value / probe for key, value in found[name].items()} for name in STAGES}
    return {**of_stages, "tower step": found["tower step"] / probe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(QUICKSTART))
    if args.worker:
        sys.stdout, stdout = sys.stderr, sys.stdout
        found = work(args.worker, args.steps)
        sys.stdout = stdout
        finish(found)
        return
    from make_data import write_quickstart

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout, stdout = sys.stderr, sys.stdout
        write_quickstart(Path(folder), preset="names")
        sys.stdout = stdout
        for name, variables in CAPABILITIES.items():
            say(f"--- {name}")
            command = [sys.executable, "-m", "benchmarks.quickstart", "--worker", folder, "--steps", str(args.steps)]
            environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout[done.stdout.index("{") :])
            say(str(found))
            results[name] = {"milliseconds": found, "passes": in_passes(found)}
    finish({"capabilities": results, "questions": QUESTIONS})


if __name__ == "__main__":
    main()
