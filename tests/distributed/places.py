"""Jobs about experts that change their places while a run goes on (`checkpoint.place_experts`)."""

import json
import re
from pathlib import Path

import torch

from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import complete_iterations, require_checkpoint
from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.conversion.routing_log import PLACED_AT
from megatron_moellava.routing.observer import RoutingObserver
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.run import train
from tests.distributed.jobs import everywhere, gather_averages, pairs, run_config, start, worst
from tests.distributed.layouts import BY_ID, MODELS, Layout
from tests.distributed.rows import Rows
from tests.distributed.runs import stage_settings
from tests.distributed.shards import gather_parameters
from tests.helpers import data_files

BEFORE, AFTER = 2, 2  # steps


def run_places(job: dict, folder: Path) -> dict:
    """A run whose experts change places after BEFORE steps, beside one whose experts stay, and one that goes on from its
    checkpoint. On rank 0, the largest relative differences."""
    layout = BY_ID[job["layout"]]
    saves = {name: folder / job["id"] / name for name in ("stays", "moves")}
    stays = _started(layout, **{"checkpoint.save": str(saves["stays"])})
    expected = _trained(stays)
    wanted = {"checkpoint.save": str(saves["moves"]), "checkpoint.place_experts": job["share"]}
    moves = _started(layout, **wanted)
    found = _trained(moves)
    run = run_config(layout, **wanted)
    resumed = Trainer(run, None, moves.train_steps)
    resumed.loader = _rows(layout, resumed, BEFORE)
    assert resumed.state.iteration == BEFORE
    for chunk in resumed.wrapped:
        chunk.train()
    again = _trained(resumed, BEFORE)
    records = [json.loads(line) for line in (saves["moves"] / "routing.jsonl").read_text().splitlines()]
    provenance = read_description(require_checkpoint(saves["moves"])).provenance
    if torch.distributed.get_rank():
        return {}
    orders = provenance.get("expert_places", [{}])[0]
    back = {name: {key: undone(part, orders) for key, part in found[name].items()} for name in ("saved", "final")}
    return {
        "orders": orders,
        "placed_at": provenance.get("experts_placed_at"),
        "records": [record["iteration"] for record in records],
        "numbers": {
            name: worst({"": (found[name], expected[name])})
            for name in ("loss", "grad_norm", "load_balancing_loss", "lr")
        },
        "saved": {name: worst(pairs(back["saved"][name], expected["saved"][name])) for name in expected["saved"]},
        "final": {name: worst(pairs(back["final"][name], expected["final"][name])) for name in expected["final"]},
        "moved": worst(pairs(found["saved"]["parameters"], expected["saved"]["parameters"]))[0],
        "copies": found["copies"],
        "resumed_losses": [again["loss"], found["loss"][BEFORE:]],
        "resumed": {name: worst(pairs(again["final"][name], found["final"][name])) for name in again["final"]},
    }


def run_placed_run(job: dict, folder: Path) -> dict:
    """A whole run on the real loader; by checkpoint, the step after which its experts last changed places."""
    rows = folder / "rows of placed run" / "rows.json"
    if torch.distributed.get_rank() == 0:
        data_files.make_set(rows.parent, 40)
    torch.distributed.barrier()
    wanted = {
        "moe.num_moe_experts": 4,
        "parallel.expert_model_parallel_size": 2,
        "checkpoint.place_experts": 1e-4,
        "logging.routing_interval": 1,
    }
    tree = stage_settings(rows, folder / job["id"])
    for name, value in wanted.items():
        set_override(tree, name, value)
    code = train(from_dict(RunConfig, tree))
    checkpoints = complete_iterations(folder / job["id"])
    return {
        "exit": code,
        "placed_at": {path.name: read_description(path).provenance.get(PLACED_AT) for path in checkpoints},
    }


def _started(layout: Layout, **more) -> Trainer:
    """With routers that choose both experts of one rank or both of the other, and so one rank more often than the other."""
    trainer, *_ = start(layout, **more)
    for router in RoutingObserver(trainer.chunks).routers.values():
        with torch.no_grad():
            first, second = router.weight.chunk(2)
            first.copy_(3 * first[:1] * torch.linspace(1.0, 1.1, len(first)).unsqueeze(1))
            second.mul_(0.1)
    trainer.optimizer.reload_model_params()
    return trainer


def _rows(layout: Layout, trainer: Trainer, first_step: int) -> Rows | None:
    if not parallel.reads_data():
        return None
    chunk, own = trainer.chunks[0], (parallel.data_parallel_rank(), parallel.data_parallel_size())
    return Rows(MODELS[layout.model].rows, chunk.backbone.vocab_size, chunk.tower, *own, first_step)


def _trained(trainer: Trainer, done: int = 0) -> dict:
    """Numbers of every step, and the weights after the save and at the end."""
    steps, saved = [], {}
    for number in range(done + 1, BEFORE + AFTER + 1):
        numbers, applied, _ = trainer.step()
        assert applied
        steps.append(numbers)
        if number == BEFORE:
            trainer.save(may_place=True)
            saved = _weights(trainer)
    names = ("loss", "grad_norm", "load_balancing_loss", "lr")
    final = _weights(trainer)
    copies = everywhere([gather_parameters(trainer.chunks)[1]])[0]
    return {name: everywhere([step[name] for step in steps]) for name in names} | {
        "saved": saved,
        "final": final,
        "copies": copies,
    }


def _weights(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    trainer.gather_parameters()
    return {"parameters": gather_parameters(trainer.chunks)[0], "averages": gather_averages(trainer)}


def undone(tensors: dict[str, torch.Tensor], orders: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Whole tensors by name, with experts under the numbers that they had before `orders`."""
    before = dict(tensors)
    for layer, order in orders.items():
        mlp = f"language_model.decoder.layers.{layer}.mlp."
        for name, value in tensors.items():
            if name.startswith(f"{mlp}router.") and len(value) == len(order):
                before[name] = value[[order.index(expert) for expert in range(len(order))]]
            elif name.startswith(mlp) and (found := re.fullmatch(r"(.*\.experts\.)(\d+)(\.linear_fc.*)", name)):
                before[f"{found[1]}{order[int(found[2])]}{found[3]}"] = value
    return before
