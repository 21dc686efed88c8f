"""Experts that change places while a run goes on: `checkpoint.place_experts`.

Where a checkpoint is written anyway it can be written with its experts in places that level the expert-parallel ranks
(`conversion/place_experts.py`), before the folder has its name: it is one whole checkpoint, the same for a job that is killed
at any moment. Then every rank takes weights and optimizer states out of it, as a run that goes on does. Nothing else of a
process knows an expert by its place between two steps: what routers count is collected in the step that counts it, and
biases are summed up with it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.config import CheckpointError, RunConfig
from megatron_moellava.conversion.place_experts import (
    Placing,
    busiest_ranks,
    loads_of,
    note,
    observations,
    placings_of,
    saved_share,
)
from megatron_moellava.conversion.routing_log import ROUTING, steps_of
from megatron_moellava.costs.shapes import Model
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.weights import load_weights
from megatron_moellava.training.checkpoint import TrainingState, load_optimizer
from megatron_moellava.training.optimizer import optimizer_step_count

from megatron.core.optimizer.optimizer import ChainedOptimizer


def better_places(run: RunConfig, model: Model, log: Path | None, state: TrainingState) -> list[Placing]:
    """Where the experts of each layer should lie from here on; empty where they stay. Collective.

    The main process decides by the routing log in `log` that it has written itself.
    """
    if run.checkpoint.place_experts is None:
        return []
    found: list[list[Placing]] = [[]]
    if parallel.is_main_process() and log is not None:
        try:
            found = [_that_pay(run, run.checkpoint.place_experts, model, log / ROUTING, state)]
        except (CheckpointError, OSError) as error:  # the others wait; and a log is not worth a run
            parallel.say(f"note: experts stay where they are: {error}")
    dist.broadcast_object_list(found, src=dist.get_world_size() - 1)
    return found[0]


def _that_pay(run: RunConfig, share: float, model: Model, routing: Path, state: TrainingState) -> list[Placing]:
    """Places that take at least `share` off the busiest rank's load.

    Judged by the newer half of the observations, of places found by the older: by those that they were found by, any noise
    would be worth a move. One observation judges nothing.
    """
    records = observations(routing, model, steps_of(state.provenance, state.iteration))
    older, newer, both = (
        loads_of(part) for part in (records[: len(records) // 2], records[len(records) // 2 :], records)
    )
    if not older or not newer:
        return []
    moe, ranks = model.required_moe, run.parallel.expert_model_parallel_size
    judged = [replace(placing, loads_E=newer[placing.layer]) for placing in placings_of(older, moe, ranks)]
    return placings_of(both, moe, ranks) if saved_share(judged) >= share else []


def orders_of(placings: Sequence[Placing]) -> dict[int, list[int]]:
    """layer (from 0) -> the expert of before that each place gets."""
    return {placing.layer: placing.order for placing in placings}


def take_places(checkpoint: Path, chunks: list[MoELlava], optimizer: ChainedOptimizer) -> None:
    """Weights, biases and optimizer states as they lie in a checkpoint of this moment. Collective.

    Data position, generators, schedule and loss scale stay what they are.
    """
    updates = optimizer_step_count(optimizer)
    load_weights(checkpoint, chunks, verified=True)
    load_optimizer(checkpoint, optimizer, chunks, updates)


def said_of(placings: Sequence[Placing], model: Model) -> str:
    """What the log says of experts that have changed places."""
    before, after = busiest_ranks(placings)
    hint = note(model.moe)
    return (
        f"{sum(placing.moved for placing in placings)} experts have changed ranks: the busiest of {placings[0].ranks} has "
        f"{after:.2f} x the mean load where it had {before:.2f}, by the newest observations"
        + (f"; {hint}" if hint else "")
    )
