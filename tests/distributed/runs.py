"""Jobs beyond one layout: whole runs on the real loader, checkpoints that do not fit, gradients that are not finite."""

import itertools
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moellava import machine, parallel, platform
from megatron_moellava.checkpoint.folders import RUN_FILE, TRACKER, newest_checkpoint, require_checkpoint
from megatron_moellava.config import CheckpointError, ParallelConfig, RunConfig, from_dict, set_override, to_dict
from megatron_moellava.data import sources
from megatron_moellava.data.loader import Batches, build_encoder
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.evaluation.closed_questions import Plan, predict
from megatron_moellava.model import weights as reading
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.precision import settled
from megatron_moellava.training import background
from megatron_moellava.training import checkpoint as checkpoints
from megatron_moellava.training.loop import TrainingDiverged
from megatron_moellava.training.optimizer import optimizer_step_count
from megatron_moellava.training.run import train
from megatron_moellava.training.teacher import make_teacher
from tests.distributed.jobs import run_config, start
from tests.distributed.layouts import BY_ID
from tests.distributed.shards import gather_parameters
from tests.helpers import data_files

from megatron.core import dist_checkpointing

TRAIN_STEPS, SAVE_INTERVAL = 4, 2
# A worker notes its position from time to time, and its state is that and the rows since. On a slow machine the two runs
# would note it at different rows: other bytes for the same position.
sources.CHECKPOINT_SECONDS = 10**6


def stage_settings(rows: Path, save: Path) -> dict:
    """A packed stage-3 run on the real loader, with dropout."""
    return {
        "model": {"backbone": "phi-2-tiny-dropout", "tower": str(data_files.ASSETS / "openai/clip-tiny")},
        "moe": {"num_moe_experts": 2, "placement": "second_half"},
        "data": {
            "sources": [{"path": str(rows), "image_folder": str(rows.parent)}],
            "tokenizer": str(data_files.ASSETS / "tok_bpe"),
            "template": "phi",
            "seq_length": 160,
            "packing": True,
            "packing_buffer": 8,
            "num_workers": 1,
        },
        "training": {"stage": 3, "precision": "fp32", "train_steps": TRAIN_STEPS, "global_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"save": str(save), "save_interval": SAVE_INTERVAL, "keep": 9},
        "logging": {"tensorboard": False, "routing_interval": 2},
    }


# What `rows` of a job adds to the settings: the frames of videos pooled, or pictures at native resolution.
OTHER_ROWS = {
    "": {},
    "-videos": {"data.video_pooling": "2x2x2", "data.video_frames": 5, "training.global_batch_size": 4},
    "-native": {"model.tower": "naflex-tiny", "data.enlarge_images": False, "training.global_batch_size": 4},
}


def _run(job: dict, folder: Path) -> RunConfig:
    kind = job.get("rows", "")
    rows = folder / f"rows{kind}" / "rows.json"
    if dist.get_rank() == 0 and not rows.exists():
        if kind == "-videos":
            data_files.make_videos(rows.parent, 40)
        else:
            data_files.make_set(rows.parent, 40)
    dist.barrier()
    tree = stage_settings(rows, folder / job["id"])
    for name, value in OTHER_ROWS[kind].items():
        set_override(tree, name, value)
    return from_dict(RunConfig, tree)


def run_whole(job: dict, folder: Path) -> dict:
    """TRAIN_STEPS steps without an interruption, with checkpoints on the way."""
    return {"exit": train(_run(job, folder))}


def run_validated(job: dict, folder: Path) -> dict:
    """The same run with held-out data beside it. `load`: the job whose weights it starts from; `goes_on`: that it continues."""
    held_out = folder / "held_out"
    if dist.get_rank() == 0 and not held_out.exists():
        data_files.write_images(held_out)
        data_files.write_rows(held_out, [data_files.row(number + 100) for number in range(7)], "long.json")
        short = [data_files.row(n, None, conversations=data_files.conversation("Is it?", "yes")) for n in range(3)]
        data_files.write_rows(held_out, short, "short.json")
    dist.barrier()
    tree = to_dict(_run(job, folder))
    sources = [{"path": str(held_out / f"{name}.json"), "image_folder": str(held_out)} for name in ("long", "short")]
    tree["validation"] = {"sources": sources, "interval": 1}
    for name, value in job.get("settings", {}).items():
        set_override(tree, name, value)
    if "load" in job:
        tree["checkpoint"]["load"] = str(folder / job["load"])
    if "goes_on" in job and dist.get_rank() == 0:
        shutil.copytree(folder / job["goes_on"], folder / job["id"])
    dist.barrier()
    return {"exit": train(from_dict(RunConfig, tree))}


def run_resumed(job: dict, folder: Path) -> dict:
    """The same command where only the first checkpoint of `source` exists: what an interruption leaves behind.

    `other_generators`: a negative control that loses the state of the random generators.
    """
    run = _run(job, folder)
    first = folder / job["source"] / f"iter_{SAVE_INTERVAL:07d}"
    copy = Path(run.checkpoint.save) / first.name
    if dist.get_rank() == 0:
        shutil.copytree(first, copy)
        if job.get("other_generators"):
            for file in (folder / job["source"] / f"iter_{TRAIN_STEPS:07d}" / "ranks").glob("generators*"):
                shutil.copy(file, copy / "ranks" / file.name)
            _forget_digests(copy)
    dist.barrier()
    return {"exit": train(run)}


def _forget_digests(checkpoint: Path) -> None:
    description = json.loads((checkpoint / "run.json").read_text())
    del description["sha256"], description["checksum"]
    (checkpoint / "run.json").write_text(json.dumps(description))


def run_differences(job: dict, folder: Path) -> dict:
    """Names of everything that is not bit-equal in the last checkpoints of two runs."""
    one, two = (folder / name / f"iter_{TRAIN_STEPS:07d}" for name in job["sources"])
    return {"different": different_tensors(one, two) + different_rank_files(one, two)}


def run_closed_questions(job: dict, folder: Path) -> dict:
    """What a model of random weights answers to closed questions, and how its routers spread their tokens."""
    images = folder / "images"
    if dist.get_rank() == 0 and not images.exists():
        data_files.write_images(images)
    trainer, _, _ = start(BY_ID[job["spread"]])
    dist.barrier()
    tokenizer = load_tokenizer(str(data_files.ASSETS / "tok_spm"))
    data = replace(trainer.run.data, template="v1", seq_length=256)
    rows = [
        {"image": ("a.png", "b.png")[number % 2], "question": f"how many {word}?", "answer": f"{number} of the {word}"}
        for number, word in enumerate(data_files.WORDS)
    ]
    encoder = build_encoder(data, tokenizer, trainer.chunks[0].tower)
    said = predict(trainer.chunks, encoder, rows, images, statistics=trainer.routing["language"])
    texts, losses = ([one[name] for one in said] for name in ("prediction", "loss"))
    reference = losses_of_training(trainer, encoder, rows, images) if dist.get_world_size() == 1 else None
    return {
        "said": texts,
        "losses": losses,
        "reference": reference,
        "choices": trainer.routing["language"].collect().choices_LME.tolist(),
    }


@torch.no_grad()
def losses_of_training(trainer, encoder, rows: list[dict], images: Path) -> list[float]:
    """The loss of each answer as a training step computes it, in one process."""
    (model,) = trainer.chunks
    plan = Plan(encoder, rows, images, blank=False, tower=model.tower, data=model.run.data)
    packed, _ = plan.of_rank(0, 1)
    losses = []
    for row, batch in zip(packed, plan.batches(packed), strict=True):
        loss_S = model(**model_inputs(batch))[0]
        parts = loss_S[: sum(len(sample) for _, sample in row)].split([len(sample) for _, sample in row])
        losses += [float(part_S.sum()) for part_S in parts]
    return losses


def different_tensors(one: Path, two: Path) -> list[str]:
    here, there = (dist_checkpointing.load_plain_tensors(str(path)) for path in (one, two))
    assert here.keys() == there.keys()
    return sorted(name for name in here if not torch.equal(here[name], there[name]))


def different_rank_files(one: Path, two: Path) -> list[str]:
    names = sorted(path.name for path in (one / "ranks").iterdir())
    assert names == sorted(path.name for path in (two / "ranks").iterdir())
    read = [[torch.load(path / "ranks" / name, weights_only=True) for name in names] for path in (one, two)]
    return [name for name, a, b in zip(names, *read, strict=True) if not _equal(a, b)]


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# --- checkpoints in the background ------------------------------------------------------------------------------------


def run_async(job: dict, folder: Path) -> dict:
    """A save whose writing is held up while the training goes on, beside one that is made at once at the same moment."""
    save = folder / job["id"]
    trainer, _, _ = start(
        BY_ID[job["layout"]], **{"checkpoint.save": str(save / "async"), "checkpoint.async_save": True}
    )
    trainer.step()
    state = checkpoints.TrainingState(iteration=1, consumed_samples=0, data=None)
    at_once = checkpoints.save_checkpoint(save / "sync", trainer.run, trainer.chunks, state, trainer.optimizer)

    may_write, write = threading.Event(), background.Writing.write
    background.Writing.write = lambda self: (may_write.wait(60), write(self))
    trainer.save()
    trainer.step()
    trainer.step()
    result = {"early": [trainer.background.poll(), newest_checkpoint(save / "async")]}
    may_write.set()
    trainer.save()  # of step 3; waits for that of step 1
    background.Writing.write = write
    result["names"] = sorted(path.name for path in (save / "async").glob("iter_*") if path.suffix != ".tmp")
    trainer._finish_save()
    first, third = (save / "async" / f"iter_{iteration:07d}" for iteration in (1, 3))
    dist.barrier()
    reading.load_weights(third, trainer.chunks)  # its digests are right
    return result | {"different": different_tensors(at_once, first), "later": len(different_tensors(at_once, third))}


# --- FP8 ----------------------------------------------------------------------------------------------------------


class SameRows(Batches):
    """The first global batch again and again, so that a run learns it by heart."""

    def __init__(self, rows):
        self._batches = itertools.cycle([next(rows) for _ in range(4)])

    def __next__(self):
        return next(self._batches)


def run_fp8(job: dict, folder: Path) -> dict:
    """Losses of a stage-3 run in bf16 and in every recipe of `job`, from the same weights on the same rows."""
    losses = {}
    for recipe in (None, *job["recipes"]):
        more = {"training.precision": "bf16", "training.fp8_recipe": recipe, "training.train_steps": job["steps"]}
        trainer, _, _ = start(
            BY_ID[job["layout"]], **more, **{"optimizer.lr": 1e-3, "optimizer.lr_decay_style": "constant"}
        )
        trainer.loader = SameRows(trainer.loader)
        losses[recipe or "bf16"] = [trainer.step()[0]["loss"] for _ in range(job["steps"])]
    return {"losses": losses}


# --- checkpoints that must be refused ---------------------------------------------------------------------------------


def run_refused(job: dict, folder: Path) -> dict:
    """The message of loading a layout's checkpoint into another model, or a damaged copy of it into the same."""
    source = require_checkpoint(folder / job["source"])
    run = run_config(BY_ID[job["layout"]])
    if "backbone" in job:
        run = replace(run, model=replace(run.model, backbone=job["backbone"]))
    parallel.initialize(run.parallel, 1)
    copy = folder / job["id"] / source.name
    if dist.get_rank() == 0:
        shutil.copytree(source, copy)
        damage(copy, job.get("damage"))
    dist.barrier()
    try:
        reading.load_weights(copy, build_model(run))
    except CheckpointError as error:
        return {"message": str(error)}
    return {"message": "no error"}


def damage(checkpoint: Path, kind: str | None) -> None:
    data = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if kind == "bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    if kind == "file":
        data.unlink()


def run_retention(job: dict, folder: Path) -> dict:
    """What is left after saves with keep=1, beside what a crash between writing and renaming leaves behind."""
    trainer, _, _ = start(BY_ID[job["layout"]])
    save = folder / job["id"]
    crashed = save / "iter_0000009.tmp"
    if dist.get_rank() == 0:
        crashed.mkdir(parents=True)
        (crashed / RUN_FILE).write_text("{}")
    left, newest = [], []
    for iteration in (6, 8):
        state = checkpoints.TrainingState(iteration=iteration, consumed_samples=0, data={})
        checkpoints.save_checkpoint(save, trainer.run, trainer.chunks, state, keep=1)
        left.append(sorted(path.name for path in save.glob("iter_*") if path != crashed))
        newest.append(str(newest_checkpoint(save).name))
    return {"left": left, "newest": newest, "tracker": (save / TRACKER).read_text().strip()}


# --- not finite -------------------------------------------------------------------------------------------------------


class Poisoned(Batches):
    """Rows whose images are NaN while `poisoned` is set; rows without images stay good."""

    def __init__(self, rows):
        self.rows, self.poisoned = rows, True

    def __next__(self):
        batch = next(self.rows)
        if self.poisoned:
            batch.pixel_values_NCHW = torch.full_like(batch.pixel_values_NCHW, float("nan"))
        return batch

    def state_dict(self) -> dict:
        return {}


def run_not_finite(job: dict, folder: Path) -> dict:
    """One poisoned step, one good one, then poisoned ones until the run gives up."""
    more = {"training.non_finite_patience": 2, "checkpoint.save": str(folder / job["id"])}
    trainer, _, _ = start(BY_ID[job["layout"]], **more)
    poison = Poisoned(trainer.loader) if trainer.loader is not None else Poisoned(None)
    trainer.loader = poison if trainer.loader is not None else None
    trainer.update = trainer.update.update
    before, _ = gather_parameters(trainer.chunks)
    histories = [history.clone() for history in trainer.fp8.state()] if trainer.fp8 else []
    numbers, applied, ids = trainer.step()
    kept = trainer.fp8.state() if trainer.fp8 else []
    same_histories: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(same_histories, all(map(torch.equal, histories, kept)))
    after, _ = gather_parameters(trainer.chunks)
    result = {
        "first_applied": applied,
        "skipped": numbers["skipped"],
        "moved": sorted(name for name in before if not torch.equal(before[name], after[name])),
        "updates": optimizer_step_count(trainer.optimizer),
        "schedule": trainer.scheduler.num_steps,
        "same_histories": all(same_histories),
        "ids": ids,
    }
    poison.poisoned = False
    result["second_applied"] = trainer.step()[1]
    result["updates_after"] = optimizer_step_count(trainer.optimizer)
    moved, _ = gather_parameters(trainer.chunks)
    result["finite"] = all(bool(value.isfinite().all()) for value in moved.values())
    poison.poisoned = True
    trainer.train_steps = 10
    try:
        trainer.train()
    except TrainingDiverged as error:
        result |= {"message": str(error), "exit": error.exit_code, "iteration": trainer.state.iteration}
    return result


# --- precision --------------------------------------------------------------------------------------------------------


def run_precision(job: dict, folder: Path) -> dict:
    """Every process of a world looks for its precision; `held back` lists the ranks whose processor may not use bf16."""
    torch.backends.cpu.get_cpu_capability()  # read by torch once, and before it is changed here
    for name in machine.HELD_BACK_BY:
        os.environ.pop(name, None)
    if dist.get_rank() in job["held back"]:
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    own, _ = machine.fastest_precision(platform.machine())
    parallel.initialize(ParallelConfig(), 1)
    run = from_dict(RunConfig, {"model": {"backbone": "llama-tiny"}, "training": {"stage": 2}})
    found = settled(run)
    os.environ.pop("ATEN_CPU_CAPABILITY", None)
    ranks: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(ranks, (own, found.run.training.precision, found.reason))
    return {"ranks": ranks}


def run_max_activations(job: dict, folder: Path) -> dict:
    """Each layer's largest activations and gradients of the first step."""
    trainer, _, _ = start(BY_ID[job["layout"]], **{"logging.max_activations_interval": 1})
    seen: list = []
    collect = trainer.max_activations.collect
    trainer.max_activations.collect = lambda scale: seen.append(collect(scale)) or seen[-1]
    trainer.step()
    return {"layers": seen[0]}


# --- preferences ------------------------------------------------------------------------------------------------------


def run_preferences(job: dict, folder: Path) -> dict:
    """Stage 4 on the real loader, from the weights of `load`; `goes_on`: the job whose first checkpoint it continues."""
    rows = folder / "pairs" / "pairs.json"
    if dist.get_rank() == 0 and not rows.exists():
        data_files.write_images(rows.parent)
        data_files.write_rows(rows.parent, [data_files.pair_row(number) for number in range(14)], rows.name)
    dist.barrier()
    tree = to_dict(_run(job, folder))
    tree["data"] |= {"sources": [{"path": str(rows), "image_folder": str(rows.parent)}], "seq_length": 320}
    tree["training"]["stage"] = 4
    tree["checkpoint"]["load"] = str(folder / job["load"])
    tree["preference"]["log_probs"] = str(folder / f"{job.get('log_probs', job['id'])}.safetensors")
    for name, value in job["settings"].items():
        set_override(tree, name, value)
    _copy_first_checkpoint(job, folder)
    code = train(from_dict(RunConfig, tree))
    last = folder / job["id"] / f"iter_{TRAIN_STEPS:07d}" / "run.json"
    return {"exit": code, "preference": json.loads(last.read_text())["preference"]}


def _copy_first_checkpoint(job: dict, folder: Path) -> None:
    if "goes_on" in job and dist.get_rank() == 0:
        first = f"iter_{SAVE_INTERVAL:07d}"
        shutil.copytree(folder / job["goes_on"] / first, folder / job["id"] / first)
    dist.barrier()


# --- distillation -----------------------------------------------------------------------------------------------------


def run_teacher(job: dict, folder: Path) -> dict:
    """The logits of the model of `load` at every label, in shards of 16 rows."""
    tree = to_dict(_run(job, folder))
    tree["checkpoint"] |= {"save": None, "load": str(folder / job["load"])}
    tree["training"]["global_batch_size"] = dist.get_world_size()
    for name, value in job["settings"].items():
        set_override(tree, name, value)
    make_teacher(from_dict(RunConfig, tree), folder / job["id"], top_k=8, dtype="float32", rows_per_shard=16)
    return {}


def run_distilled(job: dict, folder: Path) -> dict:
    """A run from the weights of `load` with the logits of `teacher`; `goes_on`: the job whose first checkpoint it continues."""
    tree = to_dict(_run(job, folder))
    tree["checkpoint"]["load"] = str(folder / job["load"])
    tree["training"]["distillation"] = {
        "teacher_logits": str(folder / job["teacher"]),
        "weight": 0.7,
        "temperature": 2.0,
    }
    for name, value in job["settings"].items():
        set_override(tree, name, value)
    _copy_first_checkpoint(job, folder)
    return {"exit": train(from_dict(RunConfig, tree))}
