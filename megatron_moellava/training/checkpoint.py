"""Sharded checkpoints: where an expert meets a file.

    SAVE/latest_checkpointed_iteration.txt
    SAVE/iter_0000100/  .metadata, *.distcp   tensors of the model and the optimizer, any layout loads them
                        ranks/                random generators by rank, data position by data-parallel rank
                        run.json              written last: a folder without it is incomplete; SHA-256 of all files

Optimizer state is kept in a canonical form (three tensors per parameter and one step count): Megatron-Core's own form
cannot change between one and several expert-parallel ranks. Nothing in a folder needs unpickling of arbitrary objects.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_moellava
from megatron_moellava import parallel, platform
from megatron_moellava.backbones import backbone_fields
from megatron_moellava.config import CheckpointError, RunConfig, to_dict
from megatron_moellava.model.checkpoint import FORMAT, RUN_FILE, complete_checkpoints, model_state, read_run_file
from megatron_moellava.model.fp8 import Emulation
from megatron_moellava.model.integrity import file_digests
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.towers import tower_fields
from megatron_moellava.training.background import BackgroundSave, Writing
from megatron_moellava.training.optimizer import distributed_optimizers, optimizer_step_count

from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.optimizer import ChainedOptimizer

TRACKER = "latest_checkpointed_iteration.txt"
_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(slots=True)
class TrainingState:
    """What a run must hold to go on as if it had not stopped."""

    iteration: int  # optimizer steps done, skipped ones included
    consumed_samples: int
    data: dict | None  # the loader's own state, of this data-parallel rank; None where this process does not read
    provenance: dict = field(default_factory=dict)  # of the weights; run.json keeps it
    fp8: list[torch.Tensor] = field(default_factory=list)  # amax histories of this rank, where FP8 is emulated


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    run: RunConfig,
    chunks: list[MoELlava],
    state: TrainingState,
    optimizer: ChainedOptimizer | None = None,
    keep: int = 2,
    background: BackgroundSave | None = None,
) -> Path:
    """Write one iteration folder, on all ranks together. It gets its name only when it is complete.

    With `background` the folder is planned and the state copied now; the caller polls it until it is complete.
    """
    final = Path(folder) / f"iter_{state.iteration:07d}"
    unfinished = final.with_name(final.name + ".tmp")

    def start() -> None:
        for left in Path(folder).glob("iter_*.tmp"):  # what processes that died have left
            shutil.rmtree(left)
        (unfinished / "ranks").mkdir(parents=True)

    _on_first_rank(start)

    tensors = {"model": model_state(chunks)}
    steps = None
    if optimizer is not None:
        tensors["optimizer"] = _optimizer_state(optimizer, tensors["model"], is_loading=False)
        steps = optimizer_step_count(optimizer)
    tensors["model"].update(_unused_tower_state(chunks[0]))
    writing = Writing(tensors, unfinished)
    _save_rank_state(unfinished / "ranks", state)
    description = _describe(run, chunks[0], state, steps)

    def complete() -> Path:
        writing.finish()
        digests = file_digests(unfinished, writing.digests)
        _on_first_rank(lambda: finish(description | {"sha256": digests}))
        return final

    def finish(description: dict) -> None:
        (unfinished / RUN_FILE).write_text(json.dumps(description, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _write_tracker(Path(folder), state.iteration)
        _remove_old(Path(folder), keep)

    if background is not None:
        background.start(writing, complete)
        return final
    writing.write()
    dist.barrier()
    return complete()


def _describe(run: RunConfig, model: MoELlava, state: TrainingState, optimizer_steps: int | None) -> dict:
    return {
        "format": FORMAT,
        "iteration": state.iteration,
        "stage": run.training.stage,
        "consumed_samples": state.consumed_samples,
        "optimizer_steps": optimizer_steps,
        "world_size": dist.get_world_size(),
        "data_parallel_size": parallel.data_parallel_size(),
        "model": {
            "backbone": model.backbone.name,
            "tower": model.tower.name,
            "moe": to_dict(run.moe) if run.moe else None,
            "backbone_fields": backbone_fields(model.backbone),
            "tower_fields": tower_fields(model.tower),
        },
        "config": to_dict(run),
        "provenance": state.provenance,
    }


def provenance_of(run: RunConfig, source: Path) -> dict:
    """Where the weights of a stage come from: `source`, and whatever that came from; the imported config goes along."""
    earlier = read_run_file(source).get("provenance") or {}
    return {
        "operation": f"training of stage {run.training.stage}",
        "source": f"{source.parent.name}/{source.name}",
        "version": megatron_moellava.__version__,
        "hf_config": earlier.get("hf_config"),
        "parent": {key: value for key, value in earlier.items() if key != "hf_config"},
    }


def _optimizer_state(optimizer: ChainedOptimizer, model_state: dict, is_loading: bool) -> dict:
    state = {}
    for index, item in enumerate(distributed_optimizers(optimizer)):
        item.init_state_fn(item.optimizer)  # moments exist only after the first step
        state[index] = item.sharded_param_state_fully_reshardable(model_state, is_loading, _OPTIMIZER_METADATA)
    return state


def _unused_tower_state(model: MoELlava) -> dict:
    carried = getattr(model, "unused_tower_tensors", {})
    rank = dist.get_rank()
    return {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank) for name, tensor in carried.items()}


def _save_rank_state(folder: Path, state: TrainingState) -> None:
    own = {"generators": platform.rng_state(), "trackers": tensor_parallel.get_cuda_rng_tracker().get_states()}
    torch.save(own | {"fp8": state.fp8}, folder / f"generators_{dist.get_rank():05d}.pt")
    if state.data is not None:
        torch.save(state.data, folder / f"data_{parallel.data_parallel_rank():05d}.pt")


def _on_first_rank(action) -> None:
    """Run on rank 0 while the others wait; if it fails there, every rank raises instead of waiting for ever."""
    failure = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise CheckpointError(
            f"cannot write the checkpoint: {failure[0]}; check space and permissions of checkpoint.save"
        )


def _write_tracker(folder: Path, iteration: int) -> None:
    temporary = folder / (TRACKER + ".tmp")
    temporary.write_text(f"{iteration}\n")
    temporary.rename(folder / TRACKER)


def _remove_old(folder: Path, keep: int) -> None:
    for old in complete_checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old)


# --- loading ----------------------------------------------------------------------------------------------------------


def load_optimizer(checkpoint: Path, optimizer: ChainedOptimizer, chunks: list[MoELlava], steps: int) -> None:
    """Restore main parameters and Adam's moments of any layout, and the number of updates done."""
    state = _optimizer_state(optimizer, model_state(chunks), is_loading=True)
    # What is empty does not come back: the state of a stage that trains nothing, or has no experts.
    loaded = dist_checkpointing.load({"optimizer": state}, str(checkpoint)).get("optimizer", {})
    for index, item in enumerate(distributed_optimizers(optimizer)):
        adam = item.optimizer
        for moments in adam.state.values():
            moments.pop("step", None)  # Megatron-Core looks for it in the file when torch's Adam keeps it here
        with torch.no_grad():
            item.load_parameter_state_from_fully_reshardable(loaded.get(index, {}))
        if isinstance(adam, torch.optim.AdamW):
            for moments in adam.state.values():
                moments["step"] = torch.tensor(float(steps))
        else:  # Transformer Engine's and apex's FusedAdam count in the group
            for group in adam.param_groups:
                group["step"] = steps


def load_rank_state(checkpoint: Path, description: dict, fp8: Emulation | None = None) -> dict[int, dict] | None:
    """Restore the random generators and FP8's histories; where data is read, returns loader states by data-parallel rank.

    They are this rank's, or all ranks' if their number has changed. Generators and histories belong to a process: under
    another number of processes they start anew.
    """
    folder = checkpoint / "ranks"
    if description["world_size"] == dist.get_world_size():
        saved = torch.load(folder / f"generators_{dist.get_rank():05d}.pt", weights_only=True)
        platform.set_rng_state(saved["generators"])
        tensor_parallel.get_cuda_rng_tracker().set_states(saved["trackers"])
        if fp8 is not None:
            fp8.load_state(saved["fp8"])
    if not parallel.reads_data():
        return None
    saved = description["data_parallel_size"]
    ranks = [parallel.data_parallel_rank()] if saved == parallel.data_parallel_size() else range(saved)
    paths = {rank: folder / f"data_{rank:05d}.pt" for rank in ranks}
    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing: the data position is lost; resume from an older checkpoint")
    return {rank: torch.load(path, weights_only=True) for rank, path in paths.items()}
