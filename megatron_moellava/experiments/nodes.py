"""Running one node of a grid: a command, an upcycling, or a training with its questions. What it leaves is done.json.

A node's folder is RUNS/<node's name>; done.json is written last, so a folder without it is unfinished. Checkpoints of a
training that was interrupted are continued, other leftovers removed.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from megatron_moellava.config import MoEConfig, MoELlavaError, current_names, from_dict, say_renamed
from megatron_moellava.experiments.curves import curve_numbers, read_lines, sample_length
from megatron_moellava.experiments.grid import Grid, Node

DONE = "done.json"


def finished(runs: Path, node: Node) -> dict | None:
    """What a node left behind, or None while it has not finished."""
    if node.kind == "given":
        return {}
    file = runs / node.name / DONE
    return json.loads(file.read_text()) if file.exists() else None


def folder_of(grid: Grid, runs: Path, node: Node) -> Path:
    """Where a node's result is."""
    if node.kind != "given":
        return runs / node.name
    path = os.path.expandvars(node.settings["folder"])
    return grid.expand(path)


def resolve(grid: Grid, runs: Path, node: Node, name: str, value: object = None) -> str:
    """The path that a setting names: below the folder of another node, or a path of its own ({here}: the grid's folder)."""
    if name in node.references:
        target, below = node.references[name]
        return str(folder_of(grid, runs, target) / below)
    text = node.settings.get(name, "") if value is None else value
    return str(grid.expand(os.path.expandvars(str(text)))) if text else ""


def run_node(grid: Grid, runs: Path, node: Node) -> None:
    """Run it in this process (a training: in this process group); all its needs are finished."""
    folder, started = runs / node.name, time.time()
    run = {"command": _run_command, "upcycle": _upcycle, "train": _train}[node.kind]
    numbers = run(grid, runs, node, folder)
    if numbers is None:  # a rank that only helps
        return
    description = {
        "step": node.step,
        "seed": node.seed,
        "settings": node.settings,
        "minutes": (time.time() - started) / 60,
    }
    temporary = folder / (DONE + ".tmp")
    temporary.write_text(json.dumps(_finite(description | {"numbers": numbers}), indent=1))
    temporary.rename(folder / DONE)


def _finite(value):
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clean(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _run_command(grid: Grid, runs: Path, node: Node, folder: Path) -> dict:
    _clean(folder)
    words = {name: str(value).replace("{here}", str(grid.folder)) for name, value in node.settings.items()}
    words |= {name: resolve(grid, runs, node, name) for name in node.references}
    words |= {"python": sys.executable, "here": str(grid.folder), "folder": str(folder), "seed": str(node.seed)}
    command = [str(part).format(**words) for part in node.settings["command"]]
    result = subprocess.run(command)
    if result.returncode:
        raise MoELlavaError(f"{' '.join(command)} ended with {result.returncode}; its output is above")
    return {}


def _upcycle(grid: Grid, runs: Path, node: Node, folder: Path) -> dict:
    from megatron_moellava.conversion.upcycle import upcycle_checkpoint

    _clean(folder)
    upcycle_checkpoint(
        Path(resolve(grid, runs, node, "from")),
        save=folder,
        moe=from_dict(MoEConfig, current_names(node.settings, say_renamed).get("moe") or {}),
        noise_std=float(node.settings.get("noise_std", 0.0)),
        router_scale=float(node.settings.get("router_scale", 1.0)),
        drop=float(node.settings.get("drop", 0.0)),
        select=str(node.settings.get("select", "")),
        seed=node.seed,
    )
    return {}


def _train(grid: Grid, runs: Path, node: Node, folder: Path) -> dict | None:
    import torch.distributed as dist

    from megatron_moellava import parallel
    from megatron_moellava.checkpoint.folders import newest_checkpoint
    from megatron_moellava.experiments.stage import ask_closed, train_stage
    from megatron_moellava.training.loop import TrainingDiverged

    run = node_run(grid, runs, node, folder)
    parallel.initialize(run.parallel, run.training.seed)
    if dist.get_rank() == 0 and (not folder.exists() or newest_checkpoint(folder) is None):
        _clean(folder)
    dist.barrier()
    scores: dict = {}
    costs: dict = {}
    diverged = False
    try:
        trainer = train_stage(run)
        costs = _costs(trainer, folder)
        if node.settings.get("ask"):
            rows, images = _questions(grid, runs, node)
            answers = ask_closed(trainer, run, rows, images)
            scores = scores_of(answers.score, answers.answered)
    except TrainingDiverged as error:
        print(error, flush=True)
        diverged = True
    is_writer = dist.get_rank() == 0
    dist.barrier()
    parallel.shutdown()
    return curve_numbers(folder) | costs | scores | {"diverged": float(diverged)} if is_writer else None


def _costs(trainer, folder: Path) -> dict[str, float]:
    """What a token costs, and millions of parameters."""
    from megatron_moellava.experiments.cost import cost_of

    model = trainer.chunks[0]
    cost = cost_of(trainer.run, model.backbone, model.tower, sample_length(read_lines(folder / "steps.jsonl")))
    return {
        "mflops_per_token": cost["flops_per_token"] / 1e6,
        "activated_parameters": cost["activated"] / 1e6,
        "parameters": cost["total"] / 1e6,
    }


def node_run(grid: Grid, runs: Path, node: Node, folder: Path):
    """The RunConfig of a training node."""
    from megatron_moellava.validation.run import load_run

    settings = node.settings
    data = resolve(grid, runs, node, "data").split(":")  # several files, as in examples/train_stage3.sh
    images = resolve(grid, runs, node, "image_folder")
    return load_run(
        config=str(grid.expand(settings["config"])) if settings.get("config") else None,
        flags={
            "training.stage": settings["stage"],
            "training.train_steps": settings["steps"],
            "training.seed": node.seed,
            "checkpoint.load": resolve(grid, runs, node, "from"),
            "checkpoint.save": str(folder),
            "data.sources": [{"path": path, "image_folder": images} for path in data],
            "data.tokenizer": resolve(grid, runs, node, "tokenizer"),
            "training.distillation.teacher_logits": resolve(grid, runs, node, "teacher"),
        },
        overrides=list(overrides_of(settings.get("set") or {})),
    )


def overrides_of(tree: dict, prefix: str = "") -> list[str]:
    """{"optimizer": {"lr": 0.1}} -> ["optimizer.lr=0.1"]; values as YAML."""
    found: list[str] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += overrides_of(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={json.dumps(value)}")
    return found


def _questions(grid: Grid, runs: Path, node: Node) -> tuple[list[dict], Path]:
    ask = node.settings["ask"]
    file = Path(resolve(grid, runs, node, "ask.questions", ask["questions"]))
    rows = [json.loads(line) for line in file.open()]
    return rows, Path(resolve(grid, runs, node, "ask.images", ask["images"]))


def scores_of(score: dict, answered: list[dict]) -> dict[str, float]:
    """Flat numbers: accuracy, loss of the true answers, accuracy of each question type, F1 of the existence questions.

    Questions that say how many `facts` their answer holds also have bits per fact: what one still costs the model.
    """
    types = {f"accuracy {name}": part["accuracy"] for name, part in score["types"].items()}
    existence = {"existence F1": score["existence"]["f1"]} if score["existence"] else {}
    held_out_loss = statistics.fmean(row["loss"] for row in answered)
    facts = sum(row.get("facts", 0) for row in answered)
    bits = {"bits_per_fact": sum(row["loss"] for row in answered) / math.log(2) / facts} if facts else {}
    return {"accuracy": score["accuracy"], "held_out_loss": held_out_loss, **bits, **types, **existence}
