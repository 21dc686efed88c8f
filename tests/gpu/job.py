"""One process that does what is asked of it, on the CPU, on a pretended GPU or on a real one, and writes down the numbers.

python -m tests.gpu.job cpu|gpu|engine|real FOLDER JOB ...   writes FOLDER/JOB.json (by rank 0); "engine": a pretended GPU
with Transformer Engine's Python code; "real": no pretending
"""

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.gpu.models import models
from tests.gpu.programs import programs

STEPS, SAVED_AT = 3, 2
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = 120  # seconds for a process that is late


def settings(folder: Path, changes: dict) -> list[str]:
    """A stage-3 run of a tiny model in fp32 on eight rows; `changes` are further settings."""
    from tests.helpers.data_files import make_set
    from tests.helpers.inference_models import TOKENIZER

    rows = folder / "rows"
    if RANK == 0 and not rows.exists():
        make_set(rows, 8)
    meet(folder, "rows")
    asked = {
        "training.precision": "fp32",
        "training.train_steps": STEPS,
        "training.global_batch_size": 2,
        "data.tokenizer": TOKENIZER,
        "data.template": "v1",
        "data.num_workers": 0,
        "data.seq_length": 512,
        "moe.num_moe_experts": 4,
        "moe.placement": "sparse",
        "checkpoint.save_interval": SAVED_AT,
        "checkpoint.keep": 9,
        "logging.tensorboard": "false",
        "logging.straggler_interval": 0,
        "logging.routing_interval": 1000,
        "optimizer.lr": 1e-3,
        **changes,
    }
    flags = ["--stage", "3", "--backbone", "llama-tiny", "--tower", "clip-tiny"]
    data = ["--data", str(rows / "rows.json"), "--image-folder", str(rows), "--save", str(folder / "save")]
    return [*flags, *data, *(f"{name}={value}" for name, value in asked.items())]


def train(folder: Path, changes: dict) -> dict:
    """Train to the end, and once more from the checkpoint in between; the last step's numbers of both."""
    from megatron_moellava.commands.train import main

    arguments = settings(folder, changes)
    join(folder, "first")
    assert main(arguments) == 0
    meet(folder, "trained")
    whole = numbers(folder)
    meet(folder, "read")
    if RANK == 0:
        forget_after(folder / "save", SAVED_AT)
    join(folder, "second")
    assert main(arguments) == 0
    meet(folder, "resumed")
    return {"steps": whole, "resumed": numbers(folder)}


def numbers(folder: Path) -> list[list[float]]:
    """Loss, gradient norm and balance loss of every step."""
    records = [json.loads(line) for line in (folder / "save/steps.jsonl").read_text().splitlines()]
    return [[record.get(name, 0.0) for name in ("loss", "grad_norm", "load_balancing_loss")] for record in records]


def join(folder: Path, name: str) -> None:
    """Make the process group of one run; torchrun's own rendezvous serves a process once."""
    import torch.distributed as dist

    from megatron_moellava import parallel, platform

    parallel.shutdown()
    if WORLD > 1:
        store = dist.FileStore(str(folder / f"{name}.store"), WORLD)
        dist.init_process_group(platform.BACKEND, store=store, rank=RANK, world_size=WORLD)


def meet(folder: Path, name: str) -> None:
    """Wait until every process of this job is here; between runs there is no process group."""
    (folder / f"{name}.{RANK}").touch()
    deadline = time.monotonic() + PATIENCE
    while not all((folder / f"{name}.{rank}").exists() for rank in range(WORLD)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name}: not all of {WORLD} processes came")
        time.sleep(0.05)


def forget_after(save: Path, iteration: int) -> None:
    for path in save.glob("iter_*"):
        if int(path.name[5:]) > iteration:
            shutil.rmtree(path)
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def generate(folder: Path, changes: dict) -> dict:
    """Greedy, sampled and beam answers side by side, one with its routing."""
    from dataclasses import replace

    from tests.helpers.inference_models import GATES, ask, tiny_engine

    engine = tiny_engine(GATES[changes["gate"]], max_batch_size=4)
    requests = [
        ask(0, max_new_tokens=4),
        ask(1, max_new_tokens=3, temperature=0.7, seed=5),
        ask(2, max_new_tokens=4, num_beams=2),
        replace(ask(3, max_new_tokens=3), record_routing=True),
    ]
    return {"tokens": {item.request_id: list(item.tokens) for item in engine.generate(requests)}}


def gates(folder: Path, changes: dict) -> dict:
    """verify's comparison of a gate that ran on the device with a recording on the host."""
    import torch

    from megatron_moellava import platform
    from megatron_moellava.model.original_gate import expert_capacity, top2_gate
    from megatron_moellava.verify.gates import compare_gate
    from megatron_moellava.verify.session import Gating
    from megatron_moellava.verify.table import Table

    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(16, 4, generator=torch.Generator().manual_seed(2))
    slots = expert_capacity(16, 4, 1.5, 2, 0)
    gate = top2_gate(logits, slots, noise)
    recorded = {
        "e1": gate.choices_NK[:, 0],
        "e2": gate.choices_NK[:, 1],
        "capacity": gate.capacity,
        "slot": gate.slots_NE,
        "weights": gate.probs_NE,
        "l_aux": gate.aux_loss,
    }
    there = [item.to(platform.device()) for item in (logits, noise)]
    table = Table()
    compare_gate(table, "a gate", Gating(there[0], top2_gate(there[0], slots, there[1])), recorded, 1e-6)
    table.close("a gate", "logits", there[0], logits, 1e-6)
    return {"rows": len(table.rows), "passes": table.passes}


def moved(folder: Path, changes: dict) -> dict:
    """Load the CPU's checkpoint here and write it again: a digest of every tensor of the copy."""
    from hashlib import sha256

    import torch

    from megatron_moellava import parallel
    from megatron_moellava.config import ParallelConfig
    from megatron_moellava.model.build import build_model
    from megatron_moellava.model.weights import load_weights
    from megatron_moellava.training.checkpoint import TrainingState, save_checkpoint
    from megatron_moellava.verify.session import gathered
    from tests.helpers.inference_models import GATES, tiny_checkpoint, tiny_run

    origin, copy = folder.parent.parent / "origin", folder / "copy"
    if not origin.exists():
        tiny_checkpoint(origin)
    digests = []
    for source, target in ((origin, copy), (copy, folder / "second")):
        parallel.initialize(ParallelConfig(), seed=7)
        run = tiny_run(GATES["megatron"])
        chunks = build_model(run)
        load_weights(next(source.glob("iter_*")), chunks)
        save_checkpoint(target, run, chunks, TrainingState(iteration=1, consumed_samples=0, data=None))
        tensors = gathered(chunks, lambda item: item)
        digests.append(
            {key: sha256(item.contiguous().view(torch.uint8).numpy()).hexdigest() for key, item in tensors.items()}
        )
        parallel.shutdown()
    assert digests[0] == digests[1]
    return {"digests": digests[0]}


ORIGINAL = {"data.packing": "false", "moe.router": "original", "moe.moe_expert_capacity_factor": 1.0}
JOBS: dict[str, tuple[Callable[[Path, dict], dict], dict]] = {
    "packed": (train, {}),
    "padded": (train, {"data.packing": "false"}),
    "original": (train, ORIGINAL),
    "bf16": (train, {"training.precision": "bf16"}),
    "megatron answers": (generate, {"gate": "megatron"}),
    "original answers": (generate, {"gate": "original deterministic"}),
    "gates": (gates, {}),
    "moved": (moved, {}),
    "background": (train, {"checkpoint.async_save": "true", "training.recompute": "full"}),
    "phi": (train, {"model.backbone": "phi-2-tiny", "data.packing": "false"}),
    "qwen3": (train, {"model.backbone": "qwen3-tiny"}),
    "models": (models, {}),
    "programs": (programs, {}),
    "stage 1": (train, {"training.stage": 1, "moe": "null"}),
    "stage 2": (train, {"training.stage": 2, "moe": "null"}),
    **{
        f"{axis} 2": (
            train,
            {
                f"parallel.{name}_parallel_size": 2,
            },
        )
        for axis, name in (("TP", "tensor_model"), ("PP", "pipeline_model"), ("EP", "expert_model"), ("CP", "context"))
    },
    "DP 2": (train, {}),
    **{
        recipe: (train, {"training.precision": "bf16", "training.fp8_recipe": recipe})
        for recipe in ("tensorwise", "delayed", "blockwise")
    },
    "ETP 2": (train, {"parallel.tensor_model_parallel_size": 2, "parallel.expert_tensor_parallel_size": 2}),
    "original TP 2": (train, ORIGINAL | {"parallel.tensor_model_parallel_size": 2}),
    "original PP 2": (train, ORIGINAL | {"parallel.pipeline_model_parallel_size": 2}),
}


def main() -> None:
    where, folder, *names = sys.argv[1:]
    if where in ("gpu", "engine"):
        from tests.gpu.pretended import install

        install(gpus=WORLD)
    if where == "engine":
        from tests.gpu.engine import install_engine

        install_engine()
    from megatron_moellava import parallel, platform

    assert (where != "cpu") is platform.HAS_CUDA
    if where != "real":
        assert (where == "engine") is platform.HAS_TRANSFORMER_ENGINE
    for name in names:
        action, changes = JOBS[name]
        place = Path(folder) / name.replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        try:
            result = action(place, changes) | counted(where)
        except Exception:
            result = {"error": traceback.format_exc()}
        parallel.shutdown()
        if RANK == 0:
            (Path(folder) / f"{name}.json").write_text(json.dumps(result))


def counted(where: str) -> dict:
    """Waits of the host inside of steps since the last call, by place."""
    if where not in ("gpu", "engine"):
        return {}
    from tests.gpu.pretended import waits

    found = {name.removeprefix("step "): count for name, count in waits.items() if name.startswith("step ")}
    waits.clear()
    if where != "engine":
        return {"waits": found}
    from tests.gpu.engine_extension import accumulated

    added = accumulated.pop("products", 0)
    return {"waits": found, "accumulated": added}


if __name__ == "__main__":
    main()
