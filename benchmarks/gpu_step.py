"""Stage-3 steps of one model with random weights on this device: python -m benchmarks.gpu_step BACKBONE [field=value ...]

Learned routing, four experts in every other layer, packed rows, JPEG photographs through the loader, AdamW. Prints one
JSON object: medians of the steps after the warm-up, peak memory beside the planner's, and the device's time by kind of
kernel (the host's by kind of operation on a CPU).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.data import photograph
from benchmarks.measure import finish
from benchmarks.profile_step import kinds_of_time
from tests.helpers.paths import ASSETS

WARM_UP = 3
NUMBERS = ("tokens_per_second", "tflops_per_device", "mfu", "step_seconds", "data_wait_share", "padding_share")
WORDS = ("a", "lake", "under", "the", "sky", "with", "three", "boats", "and", "one", "red", "car", "near", "it")


def write_data(folder: Path, samples: int) -> None:
    """Photographs with a question and a long answer, about 800 tokens with the picture's 576."""
    rng, rows = np.random.default_rng(1), []
    for number in range(samples):
        (folder / f"{number}.jpg").write_bytes(photograph(number))
        turns = [("human", "<image>\nWhat is in it?"), ("gpt", " ".join(rng.choice(WORDS, int(rng.integers(50, 250)))))]
        conversation = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": conversation})
    (folder / "rows.json").write_text(json.dumps(rows))


def build(folder: Path, backbone: str, tower: str, overrides: list[str]):
    from megatron_moellava import parallel, platform
    from megatron_moellava.model.precision import settle_and_say
    from megatron_moellava.training.run import build_trainer
    from megatron_moellava.validation.run import load_run, validate_run

    run = load_run(
        config=None,
        flags={
            "model.backbone": backbone,
            "model.tower": tower,
            "moe.num_moe_experts": 4,
            "moe.placement": "sparse",
            "training.stage": 3,
            "training.train_steps": 1000,
            "training.global_batch_size": 4,
            "training.recompute": "full",
            "data.seq_length": 4096,
            "data.sources": [{"path": str(folder / "rows.json"), "image_folder": str(folder)}],
            "data.tokenizer": str(ASSETS / "tok_bpe"),
            "data.template": "phi",
            "logging.directory": str(folder / "log"),
        },
        overrides=overrides,
    )
    validate_run(run, platform.machine())
    parallel.initialize(run.parallel, run.training.seed)
    trainer = build_trainer(settle_and_say(run))
    for wrapped in trainer.wrapped:
        wrapped.train()
    return trainer


def measure(trainer, steps: int) -> dict:
    from megatron_moellava import platform
    from megatron_moellava.costs.gpus import GIB
    from megatron_moellava.planning.memory import worst_memory

    records = [trainer.step()[0] for _ in range(WARM_UP + steps)][WARM_UP:]
    found = {name: statistics.median(item[name] for item in records) for name in NUMBERS if name in records[0]}
    modules = "te" if platform.HAS_TRANSFORMER_ENGINE else "local"
    planned = worst_memory(trainer.throughput.layout, modules).total / GIB
    memory = {"peak_memory_gib": platform.peak_memory_bytes() / GIB, "planned_memory_gib": planned}
    losses = [item["loss"] for item in records]
    return {"modules": modules} | found | memory | {"loss": losses, "kinds": kinds_of_time(trainer.step, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--tower", default="clip-vit-large-patch14-336")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    from megatron_moellava import parallel

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), args.samples)
        sys.stdout, stdout = sys.stderr, sys.stdout
        found = measure(build(Path(folder), args.backbone, args.tower, args.overrides), args.steps)
        sys.stdout = stdout
        parallel.shutdown()
    finish(found)


if __name__ == "__main__":
    main()
