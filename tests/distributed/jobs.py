"""What a launch can run: one layout, one continuation of a checkpoint, one whole run on the real loader.

Every function runs on all ranks of the job and returns plain numbers on rank 0.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_moellava import parallel
from megatron_moellava.backbones import BACKBONES
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.model import weights as reading
from megatron_moellava.model.router import OriginalRouter
from megatron_moellava.routing.observer import RoutingObserver
from megatron_moellava.routing.records import RoutingSums
from megatron_moellava.training import checkpoint as checkpoints
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.optimizer import distributed_optimizers
from megatron_moellava.training.weight_average import averages_in_place
from tests.distributed.layouts import BY_ID, MODELS, MOE, REFERENCES, SAVED_AT, SOURCES, STEPS, Layout
from tests.distributed.rows import MICRO_BATCH, NUM_ROWS, SEQ_LENGTH, Rows
from tests.distributed.shards import draw, fill, gather_gradients, gather_parameters
from tests.helpers.modalities import DEPTH

torch.set_num_threads(1)
PARTS = ("", "tower/", "projector/")  # of the model, whose routers a log tells of
TINY = {
    "llama-tiny-tied": replace(BACKBONES["llama-tiny"], share_embeddings_and_output_weights=True, vocab_size=509),
    "phi-2-tiny-biased-output": replace(BACKBONES["phi-2-tiny"], output_layer_bias=True, vocab_size=509),
    "llama-tiny-wide": replace(BACKBONES["llama-tiny"], hidden_size=64, kv_channels=16),
    "llama-tiny-rope": replace(BACKBONES["llama-tiny"], rotary_base=500000.0),
    "phi-2-tiny-dropout": replace(BACKBONES["phi-2-tiny"], hidden_dropout=0.2, attention_dropout=0.2),
}
BACKBONES.update(TINY)


def run_config(layout: Layout, **more) -> RunConfig:
    model = MODELS[layout.model]
    tree: dict = {"moe": dict(model.moe)} if model.moe else {}
    settings = {
        "model.backbone": model.backbone,
        "model.tower": "clip-tiny",
        "data.packing": model.rows != "padded",
        "data.seq_length": SEQ_LENGTH,
        "parallel.distributed_timeout_minutes": 1,
        "training.stage": 2,
        "training.trains": model.roles,
        "training.precision": "fp32",
        "training.micro_batch_size": MICRO_BATCH[model.rows],
        "training.global_batch_size": NUM_ROWS[model.rows],
        "training.train_steps": STEPS,
        "optimizer.lr": 3e-3,
        # Where a gradient is nothing but rounding, Adam with a small epsilon would blow the rounding up to a full step.
        "optimizer.adam_eps": 1e-4,
        "optimizer.weight_decay": 0.1,
        "optimizer.lr_warmup_fraction": 0.0,
        "logging.routing_interval": 1,
        "logging.tensorboard": False,
    }
    for name, value in (settings | model.run | layout.run | more).items():
        set_override(tree, name, value)
    return from_dict(RunConfig, tree)


class Recorder:
    """Stands before the trainer's update and keeps the gradients of the first step."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.update, self.gradients = trainer, trainer.update, None

    def __call__(self):
        if self.gradients is None:
            self.gradients, self.difference = gather_gradients(self.trainer.chunks, self.trainer.optimizer)
        return self.update()


def start(layout: Layout, first_step: int = 0, **more) -> tuple[Trainer, Recorder, dict[str, list]]:
    """A trainer with the weights of `shards.fill`, what records its gradients, and its counts of routed tokens."""
    run = run_config(layout, **more)
    parallel.initialize(run.parallel, run.training.seed)
    trainer = Trainer(run, None, STEPS)
    if parallel.reads_data():
        trainer.loader = Rows(
            MODELS[layout.model].rows,
            trainer.chunks[0].backbone.vocab_size,
            trainer.chunks[0].tower,
            parallel.data_parallel_rank(),
            parallel.data_parallel_size(),
            first_step,
            next(iter(run.data.modalities), DEPTH),
        )
    fill(trainer.chunks)
    trainer.optimizer.reload_model_params()
    if MODELS[layout.model].moe and not layout.model.endswith("-noise"):
        inject_noise(trainer)
    trainer.update = recorder = Recorder(trainer)
    routed: dict[str, list] = {component: [] for component in trainer.routing}
    for component, statistics in trainer.routing.items():
        statistics.collect = partial(_kept, routed[component], statistics.collect)
    for chunk in trainer.wrapped:
        chunk.train()
    return trainer, recorder, routed


def _kept(routed: list, collect) -> RoutingSums:
    routed.append(collect())
    return routed[-1]


def inject_noise(trainer: Trainer) -> None:
    """The same noise in every layout; a fresh draw would depend on the data-parallel rank."""
    for layer, router in RoutingObserver(trainer.chunks).routers.items():
        if isinstance(router, OriginalRouter):
            router.gate.noise = partial(_same_noise, f"noise {layer + 1}")


def _same_noise(name: str, logits_NE: torch.Tensor, sampler) -> torch.Tensor:
    return draw(name, list(logits_NE.shape)).abs().to(logits_NE)


# --- one layout -------------------------------------------------------------------------------------------------------


def run_layout(job: dict, folder: Path) -> dict:
    """STEPS optimizer steps; writes them down for a reference, compares with the reference otherwise."""
    layout = BY_ID[job["layout"]]
    is_reference = layout == REFERENCES[layout.model]
    if not is_reference and not reference_file(layout, folder).exists():
        raise RuntimeError("the one-process run of this model has failed")
    save = {"checkpoint.save": str(folder / layout.id)} if layout.id in SOURCES else {}
    trainer, recorder, routed = start(layout, **save)
    initial, _ = gather_parameters(trainer.chunks)
    steps = []
    for number in range(1, STEPS + 1):
        numbers, applied, _ = trainer.step()
        steps.append(numbers)
        assert applied
        if number == SAVED_AT and layout.id in SOURCES:
            trainer.save()
    trainer.gather_parameters()
    final, difference = gather_parameters(trainer.chunks)
    averages = gather_averages(trainer)
    result = {
        "loss": everywhere([step["loss"] for step in steps]),
        "grad_norm": [step["grad_norm"] for step in steps],
        **{
            name: everywhere([step.get(f"{part}{logged}", 0.0) for step in steps for part in PARTS])
            for name, logged in (("aux_loss", "load_balancing_loss"), ("z_loss", "z_loss"))
        },
        "gradients": recorder.gradients,
        "initial": initial,
        "final": final,
        "averages": averages,
        "routed": {component: torch.stack([sums.sums_GLC for sums in found]) for component, found in routed.items()},
        "groups": {component: list(found[0].groups) for component, found in routed.items()},
        "copies": max(difference, recorder.difference),
    }
    if torch.distributed.get_rank():
        return {}
    return finish(result, layout, folder)


def gather_averages(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The averaged weights of a run that has some (optimizer.ema_decay)."""
    if trainer.run.optimizer.ema_decay is None:
        return {}
    with averages_in_place(distributed_optimizers(trainer.optimizer), trainer.wrapped):
        return gather_parameters(trainer.chunks)[0]


def everywhere(values: list[float]) -> list[float]:
    """The largest over all ranks: a rank that does not know a number reports zero."""
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, values)
    return [max(column) for column in zip(*gathered, strict=True)]


def finish(result: dict, layout: Layout, folder: Path) -> dict:
    if layout == REFERENCES[layout.model]:
        torch.save(result, reference_file(layout, folder))
        moved = {name for name, value in result["final"].items() if not torch.equal(value, result["initial"][name])}
        return {
            "loss": result["loss"],
            "copies": result["copies"],
            "moved": sorted(moved),
            "gradients": sorted(result["gradients"]),
            "zero": sorted(name for name, value in result["gradients"].items() if not value.any()),
        }
    return compare(result, torch.load(reference_file(layout, folder), weights_only=True))


def reference_file(layout: Layout, folder: Path) -> Path:
    return folder / f"{layout.model}.reference.pt"


def compare(result: dict, reference: dict) -> dict:
    """Largest relative differences, each with the name of the tensor where it is."""
    counts = 2 * MOE["num_moe_experts"]  # the columns of choices, after and before dropping, are whole numbers
    same_routing = result["groups"] == reference["groups"] and all(
        len(result["groups"][component]) > (2 if component == "language" else 0)
        and torch.equal(routed[..., :counts], reference["routed"][component][..., :counts])
        and bool(routed[..., :counts].sum() > 0)
        for component, routed in result["routed"].items()
    )
    still = [name for name, value in reference["final"].items() if torch.equal(value, reference["initial"][name])]
    return {
        **{
            name: worst({str(i): (a, b) for i, (a, b) in enumerate(zip(result[name], reference[name], strict=True))})
            for name in ("loss", "grad_norm", "aux_loss", "z_loss")
        },
        "gradients": worst(pairs(result["gradients"], reference["gradients"])),
        "parameters": worst(pairs(result["final"], reference["final"])),
        "averages": worst(pairs(result["averages"], reference["averages"])),
        "updates": worst(pairs(updates(result), updates(reference))),
        "copies": result["copies"],
        "same_routing": same_routing,
        "routing_sums": worst(_columns(result, reference, counts)),
        "frozen_moved": [name for name in still if not torch.equal(result["final"][name], reference["final"][name])],
    }


def _columns(result: dict, reference: dict, first: int) -> dict:
    """Probabilities, entropy and confidences: sums of rounded numbers."""
    return {
        f"{component} {column}": (routed[..., column], reference["routed"][component][..., column])
        for component, routed in result["routed"].items()
        for column in range(first, routed.shape[-1])
    }


def updates(result: dict) -> dict:
    return {name: value - result["initial"][name] for name, value in result["final"].items()}


def pairs(here: dict, there: dict) -> dict:
    assert here.keys() == there.keys(), sorted(here.keys() ^ there.keys())
    return {name: (here[name], there[name]) for name in here}


def worst(values: dict) -> tuple[float, str]:
    """max |a - b| / max |b| per entry, the largest of all; where b is all zero a must be as well."""
    found = (0.0, "")
    for name, (here, there) in values.items():
        here, there = torch.as_tensor(here), torch.as_tensor(there)
        assert here.shape == there.shape, (name, here.shape, there.shape)
        difference, size = float((here - there).abs().max()), float(there.abs().max())
        error = difference / size if size else (float("inf") if difference else 0.0)
        found = max(found, (error if error == error else float("inf"), name))
    return found


# --- a checkpoint of one layout continued in another ------------------------------------------------------------------


def run_continuation(job: dict, folder: Path) -> dict:
    """The last step of a run whose first steps another layout made; compared with one process that made them all.

    Negative controls: `zero_moments` forgets Adam's state, `skip_weights` the parameters. Both must be seen.
    """
    layout = BY_ID[job["layout"]]
    checkpoint = require_checkpoint(folder / job["source"])
    description = read_description(checkpoint)
    trainer, _, _ = start(layout, first_step=SAVED_AT)
    if not job.get("skip_weights"):
        reading.load_weights(checkpoint, trainer.chunks)
    trainer.optimizer.reload_model_params()
    if not job.get("zero_moments"):
        checkpoints.load_optimizer(checkpoint, trainer.optimizer, trainer.chunks, description.optimizer_steps)
    if job.get("skip_weights"):  # the optimizer's copy has filled them
        fill(trainer.chunks)
        trainer.optimizer.reload_model_params()
    trainer.state.iteration = SAVED_AT
    trainer.scheduler.step(increment=SAVED_AT)
    numbers, _, _ = trainer.step()
    trainer.gather_parameters()
    final, difference = gather_parameters(trainer.chunks)
    averages = gather_averages(trainer)
    loss = everywhere([numbers["loss"]])
    if torch.distributed.get_rank():
        return {}
    reference = torch.load(reference_file(layout, folder), weights_only=True)
    return {
        "loss": worst({"": (loss[0], reference["loss"][-1])}),
        "parameters": worst(pairs(final, reference["final"])),
        "averages": worst(pairs(averages, reference["averages"])),
        "copies": difference,
    }
