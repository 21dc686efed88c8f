"""Experts of a training checkpoint change places, so that expert-parallel ranks are busy alike; the model stays what it was.

With an expert go its weights, its adapters, their optimizer states and averages, its row in the router and its bias. In a
sharded checkpoint an expert is a piece of its own: it changes its place in `.metadata`, and no byte of it moves. Only the
routers' tensors, which hold all experts in one piece, are written anew.

Between two jobs `place_experts` writes another checkpoint so; a run with `checkpoint.place_experts` lets `exchange` do it to
one that it is writing.
"""

import io
import itertools
import os
import pickle
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from megatron_moellava.checkpoint.description import RunDescription, write_description
from megatron_moellava.checkpoint.folders import (
    RUN_FILE,
    complete_iterations,
    require_checkpoint,
    write_durably,
    write_tracker,
)
from megatron_moellava.checkpoint.integrity import file_digests, files_below
from megatron_moellava.checkpoint.safe_pickle import restricted_load
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError, MoEConfig, ParallelConfig
from megatron_moellava.conversion.routing_log import PLACED_AT, asked_for, fits, records_of, steps_of
from megatron_moellava.conversion.writers import staged
from megatron_moellava.costs.expert_places import busiest_over_mean, kinds_of_places, level_order
from megatron_moellava.costs.shapes import LANGUAGE, Model, model_from_json

RECORDS = 20  # observations that the loads are taken from, the newest
REWRITTEN = "__places_{}.distcp"
METADATA = ".metadata"
PLACES = "expert_places"  # in a checkpoint's provenance: every order so far


@dataclass(frozen=True, kw_only=True, slots=True)
class Placing:
    """What was found for one layer: `order[place]` is the expert of today that the place gets."""

    layer: int
    loads_E: list[int]
    order: list[int]
    ranks: int

    @property
    def before(self) -> float:
        """Busiest rank over the mean, as the experts lie."""
        return busiest_over_mean(self.loads_E, self.ranks)

    @property
    def after(self) -> float:
        """The same with the experts in their new places."""
        return busiest_over_mean([self.loads_E[expert] for expert in self.order], self.ranks)

    @property
    def moved(self) -> int:
        """Experts that change their rank."""
        size = len(self.order) // self.ranks
        return sum(place // size != expert // size for place, expert in enumerate(self.order))


def find_places(
    run: RunDescription, routing: Path, expert_parallel_size: int | None, records: int = RECORDS
) -> list[Placing]:
    """The order of every layer with experts, from the newest `records` of a run's `routing.jsonl`.

    Raises ConfigError where there is nothing to place, CheckpointError where the file is not of this model.
    """
    if run.adapter is not None:
        raise CheckpointError(
            "the checkpoint is an adapter, whose base has the experts: join the two first, moellava convert merge"
        )
    if ((run.config or {}).get("training") or {}).get("fp8_recipe") == "delayed":
        raise CheckpointError(
            "training.fp8_recipe=delayed keeps histories of every expert by rank, which would stay behind: go on for a step "
            "with another recipe first, or in bf16"
        )
    model = model_from_json(run.model)
    if model.moe is None:
        raise ConfigError("the checkpoint has no experts to place")
    ranks = expert_parallel_size or _parallel(run)
    if ranks < 2 or model.moe.num_moe_experts % ranks:
        raise ConfigError(
            f"--expert-parallel {ranks}{'' if expert_parallel_size else ', as the run has it'}: give a number of ranks above 1 "
            f"that divides the {model.moe.num_moe_experts} experts"
        )
    return placings_of(_loads(routing, run, model, records), model.moe, ranks)


def placings_of(loads: dict[int, list[int]], moe: MoEConfig, ranks: int) -> list[Placing]:
    """The best order that is known for each layer; `loads`: layer (from 0) -> choices of each expert."""
    kinds = kinds_of_places(moe)
    return [
        Placing(layer=layer, loads_E=loads_E, order=level_order(loads_E, ranks, kinds), ranks=ranks)
        for layer, loads_E in sorted(loads.items())
    ]


def busiest_ranks(placings: Sequence[Placing]) -> tuple[float, float]:
    """Busiest rank over the mean, now and with the experts in their new places: means over layers."""
    return fmean(placing.before for placing in placings), fmean(placing.after for placing in placings)


def saved_share(placings: Sequence[Placing]) -> float:
    """Of the experts' time that goes by the busiest rank of each layer, what other places take off."""
    before, after = busiest_ranks(placings)
    return 1.0 - after / before


def _parallel(run: RunDescription) -> int:
    parallel = (run.config or {}).get("parallel") or {}
    return parallel.get("expert_model_parallel_size", ParallelConfig().expert_model_parallel_size)


def observations(routing: Path, model: Model, steps: range, records: int = RECORDS) -> list[dict]:
    """The newest records of `steps`, oldest first; CheckpointError where the file is of another model."""
    newest = records_of(routing, steps)[-records:]
    experts = model.required_moe.num_moe_experts
    if not all(fits(record, model.moe_layers, experts) for record in newest):
        layers = ", ".join(map(str, model.moe_layers))
        raise CheckpointError(
            f"{routing} is not of this model, with {experts} experts in layers {layers}; give its run's own"
        )
    return newest


def loads_of(records: list[dict]) -> dict[int, list[int]]:
    """layer (from 0) -> choices of each expert; empty where a layer was not observed."""
    loads = asked_for(records)
    return loads if all(map(sum, loads.values())) else {}


def _loads(routing: Path, run: RunDescription, model: Model, records: int) -> dict[int, list[int]]:
    """Of the newest records before the checkpoint, or CheckpointError where there are none."""
    if not routing.is_file():
        raise CheckpointError(
            f"{routing} does not exist; name the routing.jsonl of the run with --routing (logging.routing_interval writes it)"
        )
    steps = steps_of(run.provenance, run.iteration)
    loads = loads_of(observations(routing, model, steps, records))
    if not loads:
        since = f" since experts changed places at step {steps.start - 1}" if steps.start else ""
        raise CheckpointError(
            f"{routing} holds no observation of every layer up to step {run.iteration}{since}; train on, or name another with "
            "--routing"
        )
    return loads


def placed(provenance: dict, orders: dict[int, list[int]], iteration: int) -> dict:
    """The provenance of weights whose experts have changed places at a step."""
    order = {str(layer): order for layer, order in orders.items()}
    return provenance | {PLACES: [*provenance.get(PLACES, []), order], PLACED_AT: iteration}


def note(moe: MoEConfig | None) -> str:
    """What does not stay the same, in words; empty where all does but for the order of sums."""
    if moe is None or moe.router != "original":
        return ""
    drawn = "the noise is drawn for places, not for experts, so the"
    if moe.moe_router_topk == 1:
        return f"moe.moe_router_topk=1: {drawn} tokens that a full expert keeps are other ones, as with another seed"
    if moe.second_choice == "sampled":
        return f"moe.second_choice=sampled: {drawn} second choices of training are other ones, as with another seed"
    return ""


def place_experts(checkpoint: Path, save: Path, placings: Sequence[Placing], *, verify: bool = True) -> Path:
    """Write the newest checkpoint of a run, with optimizer states and all, as the newest of the folder `save`; return it.

    Data files are hard links where the file system has them. A run with `--save SAVE` goes on from there.
    """
    source = require_checkpoint(checkpoint)
    run = verify_checkpoint(source, verify=verify)
    if complete_iterations(save):
        raise CheckpointError(f"{save} holds a run already; choose another --save")
    folder = Path(save) / source.name
    orders = {placing.layer: placing.order for placing in placings}
    with staged(folder) as staging:
        for name in files_below(source):
            if name not in (RUN_FILE, METADATA):
                _take_over(source / name, staging / name)
        changed = exchange(source, staging, orders)
        kept = {name: digest for name, digest in run.sha256.items() if name not in changed}
        digests = kept | file_digests(staging, changed if kept else files_below(staging))
        provenance = placed(run.provenance, orders, run.iteration)
        write_description(staging, replace(run, sha256=digests, provenance=provenance))
    write_tracker(Path(save), run.iteration)
    return folder


def _take_over(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def exchange(source: Path, target: Path, orders: dict[int, list[int]]) -> list[str]:
    """Write `.metadata` with the pieces of experts exchanged, and the tensors that hold all experts in one piece anew.

    `target`: a folder with the data files of the checkpoint `source`, or `source` itself while nobody reads it. Returns the
    names of what was written.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with (source / METADATA).open("rb") as file:
        metadata = restricted_load(file)
    storage, whole = dict(metadata.storage_data), {}
    for key, entry in metadata.state_dict_metadata.items():
        order = _order_of(key, orders)
        if order is None:
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{key} is of an expert and no tensor, it would stay behind; it is of another version or another program"
            )
        if entry.size[0] != len(order):
            raise CheckpointError(f"{key} has {entry.size[0]} rows and not one for each of {len(order)} experts")
        if all(chunk.sizes[0] == 1 for chunk in entry.chunks):
            storage |= _moved(key, order, metadata.storage_data)
        else:
            whole[key] = order
    written = [METADATA]
    if whole:  # into a file that `source` has none of that name: it may be of places changed before, and linked
        written.append(next(name for name in map(REWRITTEN.format, itertools.count()) if not (source / name).exists()))
        storage |= _rewritten(source, target / written[-1], whole, metadata)
    write_durably(target / METADATA, pickle.dumps(replace(metadata, storage_data=storage)))
    return written


def _order_of(key: str, orders: dict[int, list[int]]) -> list[int] | None:
    """The order of the layer whose experts or router a stored tensor belongs to; None: neither."""
    _, found, inner = key.partition(f"{LANGUAGE}decoder.layers.")
    layer, _, part = inner.partition(".")
    if not found or not part.startswith(("mlp.experts.", "mlp.router.")):
        return None
    return orders.get(int(layer))


def _moved(key: str, order: list[int], storage: dict) -> dict:
    """Index of a piece -> where the piece lies that comes there."""
    pieces = {tuple(index.offset): (index, place) for index, place in storage.items() if index.fqn == key}
    return {index: pieces[(order[offset[0]], *offset[1:])][1] for offset, (index, _) in pieces.items()}


def _rewritten(source: Path, target: Path, whole: dict[str, list[int]], metadata) -> dict:
    """Write the tensors of `whole` with their rows in the new order into a file; index of a piece -> where it lies."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    from megatron_moellava.checkpoint.safe_pickle import guard

    guard()
    entries = {key: metadata.state_dict_metadata[key] for key in whole}
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with warnings.catch_warnings():  # that one process loads, which is meant
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, checkpoint_id=source, no_dist=True)
    storage = {}
    indices = {(index.fqn, tuple(index.offset)): index for index in metadata.storage_data if index.fqn in whole}
    with target.open("wb") as file:
        for key, entry in entries.items():
            ordered = tensors[key][torch.tensor(whole[key])]
            for chunk in entry.chunks:
                region = tuple(
                    slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                start, content = file.tell(), io.BytesIO()
                torch.save(ordered[region].clone(), content)
                file.write(content.getbuffer())
                storage[indices[key, tuple(chunk.offsets)]] = _StorageInfo(target.name, start, file.tell() - start)
        file.flush()
        os.fsync(file.fileno())
    return storage
