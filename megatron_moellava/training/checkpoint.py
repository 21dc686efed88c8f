"""Sharded checkpoints: where an expert meets a file.

    SAVE/latest_checkpointed_iteration.txt
    SAVE/iter_0000100/  .metadata, *.distcp   tensors of the model and the optimizer, any layout loads them
                        ranks/                random generators by rank, data position by data-parallel rank
                        run.json              written last: a folder without it is incomplete; SHA-256 of all files
    SAVE/iter_0000100.damaged                 a checkpoint whose files are no longer what was written, set aside
    SAVE/iter_0000100.superseded              a checkpoint that the run has gone back behind, set aside

Optimizer state is kept in a canonical form (three tensors per parameter and one step count): Megatron-Core's own form
cannot change between one and several expert-parallel ranks. Nothing in a folder needs unpickling of arbitrary objects.
"""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import megatron_moellava
from megatron_moellava import parallel, platform
from megatron_moellava.checkpoint.description import RunDescription, parent_of, read_description, write_description
from megatron_moellava.checkpoint.folders import (
    AVERAGE,
    AVERAGES,
    DAMAGED,
    SUPERSEDED,
    UNFINISHED,
    complete_iterations,
    iteration_folder,
    write_durably,
    write_tracker,
)
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.checkpoint.resume_point import ResumePoint, resume_point
from megatron_moellava.checkpoint.verification import digests_together, verify_checkpoint
from megatron_moellava.config import CheckpointError, RunConfig, to_dict
from megatron_moellava.conversion.place_experts import exchange
from megatron_moellava.model.fp8_emulation import Emulation
from megatron_moellava.model.fp8_engine import EngineHistories
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.weights import kept_state, model_state, readable
from megatron_moellava.training.background import BackgroundSave, Writing
from megatron_moellava.training.optimizer import distributed_optimizers, optimizer_step_count
from megatron_moellava.training.whole_states import Sharded, init_moments, load_whole_states, of_weight, whole_states

from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

# Memory-efficient: only the first data-parallel rank gathers the state, over gloo into host memory. Otherwise every rank
# of a node would hold all of it, 12 bytes per trained parameter each, and the GPUs a second copy while it is gathered.
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


@dataclass(slots=True)
class TrainingState:
    """What a run must hold to go on as if it had not stopped."""

    iteration: int  # optimizer steps done, skipped ones included
    consumed_samples: int
    data: dict | None  # the loader's own state, of this data-parallel rank; None where this process does not read
    provenance: dict = field(default_factory=dict)  # of the weights; run.json keeps it
    validation: dict = field(default_factory=dict)  # {loss, iteration} of the best one so far
    loss_scale: dict = field(default_factory=dict)  # of a run in fp16
    preference: dict = field(default_factory=dict)  # of stage 4; run.json keeps it
    distillation: dict = field(default_factory=dict)  # of a run with a teacher; run.json keeps it
    base: dict | None = None  # of a run with adapters: checkpoint.base.name_of_base
    fp8: list[torch.Tensor] = field(default_factory=list)  # what FP8 remembers on this rank


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    run: RunConfig,
    chunks: list[MoELlava],
    state: TrainingState,
    optimizer: ChainedOptimizer | None = None,
    keep: int = 2,
    background: BackgroundSave | None = None,
    orders: dict[int, list[int]] | None = None,
) -> Path:
    """Write one iteration folder, on all ranks together. It gets its name only when it is complete.

    With `background` the folder is planned and the state copied now; the caller polls it until it is complete. `orders`: by
    layer (from 0) which expert of now each place gets in the checkpoint.
    """
    final = iteration_folder(folder, state.iteration)
    unfinished = final.with_name(final.name + UNFINISHED)

    def start() -> None:
        for left in Path(folder).glob(f"iter_*{UNFINISHED}"):  # what processes that died have left
            shutil.rmtree(left)
        (unfinished / "ranks").mkdir(parents=True)

    def complete() -> Path:
        _together(writing.finish, unfinished)
        if orders:
            _together(lambda: exchange(unfinished, unfinished, orders), unfinished, on=0)
        digests = digests_together(unfinished, writing.digests)
        _together(lambda: finish(replace(description, sha256=digests)), unfinished, on=0)
        return final

    def finish(description: RunDescription) -> None:
        write_description(unfinished, description)
        shutil.rmtree(final, ignore_errors=True)
        write_tracker(Path(folder), state.iteration)
        unfinished.rename(final)
        _remove_old(Path(folder), keep, newest=final)

    _together(start, unfinished, on=0)
    tensors = {"model": kept_state(chunks)}
    steps = None
    if optimizer is not None:
        tensors["optimizer"] = _optimizer_state(optimizer, tensors["model"])
        steps = optimizer_step_count(optimizer)
    tensors["model"].update(_unused_tower_state(chunks[0]))
    writing = Writing(tensors, unfinished)
    _together(lambda: _save_rank_state(unfinished / "ranks", state), unfinished)
    description = _describe(run, chunks[0], state, steps)
    if background is not None:
        background.start(writing, complete)
        return final
    _together(writing.write, unfinished)
    return complete()


def _describe(run: RunConfig, model: MoELlava, state: TrainingState, optimizer_steps: int | None) -> RunDescription:
    return RunDescription(
        iteration=state.iteration,
        stage=run.training.stage,
        consumed_samples=state.consumed_samples,
        optimizer_steps=optimizer_steps,
        world_size=dist.get_world_size(),
        data_parallel_size=parallel.data_parallel_size(),
        model=model.sizes().to_json(),
        config=to_dict(run),
        loss_scale=state.loss_scale,
        provenance=state.provenance,
        validation=state.validation,
        preference=state.preference,
        distillation=state.distillation,
        adapter={"lora": to_dict(run.training.lora), "base": state.base} if run.training.lora else None,
    )


def provenance_of(run: RunConfig, source: Path) -> dict:
    """Where the weights of a stage come from: `source`, and whatever that came from; the imported config goes along."""
    description = read_description(source)
    return {
        "operation": f"training of stage {run.training.stage}",
        "source": f"{source.parent.name}/{source.name}",
        "source_seal": description.checksum,  # tells whether another folder holds the same start
        "version": megatron_moellava.__version__,
        "hf_config": description.provenance.get("hf_config"),
        "parent": parent_of(description, carried=("hf_config",)),
    }


def _optimizer_state(optimizer: ChainedOptimizer, model_state: dict) -> dict:
    """By number of the optimizer and of the parameter; empty on all data-parallel ranks but the first."""
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        return whole_states(optimizer, model_state)
    state = {}
    for index, item in enumerate(distributed_optimizers(optimizer)):
        init_moments(item)
        state[index] = item.sharded_param_state_fully_reshardable(model_state, metadata=_OPTIMIZER_METADATA) or {}
    return state


def _wanted_optimizer_state(optimizer: ChainedOptimizer, model_state: dict, has_average: bool) -> dict:
    """Where `_optimizer_state` of a checkpoint shall go: of each parameter that this rank has any part of.

    Megatron-Core's own request, that of `sharded_param_state_fully_reshardable`, is of all parameters on every rank.
    """
    by_parameter = {sharded.data: sharded for sharded in model_state.values()}
    state: dict[int, dict] = {}
    for index, item in enumerate(distributed_optimizers(optimizer)):
        init_moments(item)
        state[index] = {
            number: {
                key: _empty(by_parameter[parameter], key)
                for key in ("param", *item.optimizer_state_keys)
                if has_average or key != AVERAGE
            }
            for number, parameter in _owned_parameters(item)
        }
    return state


def _owned_parameters(item: DistributedOptimizer) -> Iterator[tuple[int, torch.nn.Parameter]]:
    """(number in Megatron-Core's order, parameter) of each that has some of its elements on this rank."""
    before = 0
    for buffer, by_dtype in zip(item.buffers, item.gbuf_ranges, strict=True):
        for buckets in by_dtype.values():
            owned = {parameter for bucket in buckets for parameter in bucket["param_map"]}
            numbered = enumerate(buffer.param_index_map, before)
            yield from ((number, parameter) for number, parameter in numbered if parameter in owned)
            before += len(buffer.param_index_map)


def _empty(weight: Sharded, key: str) -> Sharded:
    """A request for one tensor of a parameter's state, split over the ranks as the weight is."""
    return of_weight(weight, key, torch.empty(weight.data.shape, dtype=torch.float32))


def _unused_tower_state(model: MoELlava) -> dict:
    carried = getattr(model, "unused_tower_tensors", {}) if model.adapters is None else {}
    rank = dist.get_rank()
    return {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=rank) for name, tensor in carried.items()}


def _save_rank_state(folder: Path, state: TrainingState) -> None:
    own = {"generators": platform.rng_state(), "trackers": tensor_parallel.get_cuda_rng_tracker().get_states()}
    write_durably(folder / f"generators_{dist.get_rank():05d}.pt", _serialized(own | {"fp8": state.fp8}))
    if state.data is not None:
        write_durably(folder / f"data_{parallel.data_parallel_rank():05d}.pt", _serialized(state.data))


def _serialized(value: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _together(action: Callable[[], object], unfinished: Path, on: int | None = None) -> None:
    """Run `action` on rank `on`, or on all. If it fails on one, all raise CheckpointError instead of waiting for ever."""
    failure = None
    if on is None or on == dist.get_rank():
        try:
            action()
        except _UNWRITTEN as error:
            failure = f"rank {dist.get_rank()}: {str(error).strip() or type(error).__name__}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    found = [item for item in failures if item]
    if not found:
        return
    folder = unfinished.parent
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    left = max(complete_iterations(folder), default=None)
    raise CheckpointError(
        f"cannot write the checkpoint {unfinished.with_suffix('')}: {_space(folder)}; {'; '.join(found)}. Mend "
        "checkpoint.save (space, permissions, mount) and give the same command again; "
        + (f"it continues from {left.name}" if left else "there is no earlier checkpoint, it starts anew")
    )


_UNWRITTEN = (OSError, RuntimeError, AssertionError, CheckpointError, CheckpointingException, CheckpointException)


def _space(folder: Path) -> str:
    """What a user checks first, since the library in between may swallow the system's reason."""
    folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(folder, os.W_OK):
        return f"{folder} is not writable"
    usage = shutil.disk_usage(folder)
    return f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB are free there"


def _remove_old(folder: Path, keep: int, newest: Path) -> None:
    """All but the `keep` newest, `newest` among them: what carries a higher number is not of this run's past."""
    past = [path for path in complete_iterations(folder) if path.name <= newest.name]
    for old in past[: -max(keep, 1)]:
        going = old.rename(old.with_suffix(UNFINISHED))  # half removed, it must not look complete
        shutil.rmtree(going)


def keep_only(checkpoint: Path) -> None:
    """Remove every other checkpoint of its folder; collective."""

    def remove() -> None:
        for other in complete_iterations(checkpoint.parent):
            if other != checkpoint:
                shutil.rmtree(other.rename(other.with_suffix(UNFINISHED)))

    _together(remove, checkpoint, on=0)


# --- loading ----------------------------------------------------------------------------------------------------------


def newest_intact(folder: str | Path, say: Callable[[str], None], ckpt_step: int | None = None) -> Path | None:
    """The checkpoint to go on from (`resume_point`) whose files are all what was written; None where there has never been one.

    Damaged ones are set aside under another name, so that retention does not count them, and so are those that the user
    has gone back behind. CheckpointError when all are damaged: to start anew in silence would throw the run away. Collective.
    """
    point = _resume_point_of_all(folder, ckpt_step)
    damaged = []
    for checkpoint in point.candidates:
        try:
            verify_checkpoint(checkpoint, together=True, goes_back=False, say=say)  # `point.note` says it
        except DamagedCheckpoint as error:
            if point.candidates == [checkpoint] and ckpt_step is not None:
                raise CheckpointError(f"checkpoint.ckpt_step={ckpt_step}: {error}; or choose another step") from error
            say(f"{error}; set aside as {checkpoint.name}{DAMAGED}")
            damaged.append(checkpoint)
            continue
        if point.note:
            say(f"note: {point.note}")
        setting_aside = partial(_leave_only, checkpoint, damaged, point.superseded)
        _together(setting_aside, checkpoint.with_suffix(UNFINISHED), on=0)
        return checkpoint
    if damaged:
        raise CheckpointError(f"{folder}: all checkpoints are damaged; restore one, or choose another checkpoint.save")
    return None


def _resume_point_of_all(folder: str | Path, ckpt_step: int | None) -> ResumePoint:
    """The first rank's: a network file system may show checkpoints to some ranks later than to others."""
    found: list[ResumePoint | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [resume_point(folder, ckpt_step)]
        except CheckpointError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    assert found[0] is not None
    return found[0]


def _leave_only(chosen: Path, damaged: list[Path], superseded: list[Path]) -> None:
    """`chosen` becomes the newest of the folder."""
    for checkpoint in damaged:
        target = checkpoint.with_suffix(DAMAGED)
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.rename(target)
    for checkpoint in superseded:  # whole, and of another try each: none of them replaces another
        names = (checkpoint.with_suffix(SUPERSEDED + (f".{number}" if number else "")) for number in range(10**6))
        checkpoint.rename(next(name for name in names if not name.exists()))
    if superseded:
        write_tracker(chosen.parent, int(chosen.name.removeprefix("iter_")))


def load_optimizer(checkpoint: Path, optimizer: ChainedOptimizer, chunks: list[MoELlava], steps: int) -> None:
    """Restore main parameters and Adam's moments of any layout, and the number of updates done."""
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        wanted = whole_states(optimizer, model_state(chunks), lambda value: torch.empty(value.shape, dtype=value.dtype))
        with readable(checkpoint):
            loaded = dist_checkpointing.load({"optimizer": wanted}, str(checkpoint), validate_access_integrity=False)
        load_whole_states(optimizer, loaded.get("optimizer", {}), steps)
        return
    keeps_average = any(AVERAGE in item.optimizer_state_keys for item in distributed_optimizers(optimizer))
    has_average = keeps_average and _has_average(checkpoint)
    state = _wanted_optimizer_state(optimizer, model_state(chunks), has_average)
    # What is empty does not come back: the state of a stage that trains nothing, or has no experts.
    with readable(checkpoint):
        # The check would want every tensor asked for by the first rank that has a copy of the weight.
        loaded = dist_checkpointing.load({"optimizer": state}, str(checkpoint), validate_access_integrity=False)
    loaded = loaded.get("optimizer", {})
    for index, item in enumerate(distributed_optimizers(optimizer)):
        adam = item.optimizer
        for moments in adam.state.values():
            moments.pop("step", None)  # Megatron-Core looks for it in the file when torch's Adam keeps it here
        if keeps_average and not has_average:  # of a run that had none: it begins with the weights
            for tensors in loaded.get(index, {}).values():
                tensors[AVERAGE] = tensors["param"]
        with torch.no_grad():
            item.load_parameter_state_from_fully_reshardable(loaded.get(index, {}))
        if isinstance(adam, torch.optim.AdamW):
            for moments in adam.state.values():
                moments["step"] = torch.tensor(float(steps))
        else:  # Transformer Engine's and apex's FusedAdam count in the group
            for group in adam.param_groups:
                group["step"] = steps


def _has_average(checkpoint: Path) -> bool:
    """Whether the run of a checkpoint averaged its weights."""
    with readable(checkpoint):
        stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return any(name.startswith(AVERAGES) for name in stored)


def load_rank_state(
    checkpoint: Path, description: RunDescription, fp8: Emulation | EngineHistories | None = None
) -> dict[int, dict] | None:
    """Restore the random generators and FP8's histories; where data is read, returns loader states by data-parallel rank.

    They are this rank's, or all ranks' if their number has changed. Generators and histories belong to a process: under
    another number of processes they start anew. CheckpointError when a data position is missing.
    """
    folder = checkpoint / "ranks"
    if description.world_size == dist.get_world_size():
        with readable(checkpoint):
            saved = torch.load(folder / f"generators_{dist.get_rank():05d}.pt", weights_only=True)
        platform.set_rng_state(saved["generators"])
        tensor_parallel.get_cuda_rng_tracker().set_states(saved["trackers"])
        if fp8 is not None:
            fp8.load_state(saved["fp8"])
    if not parallel.reads_data():
        return None
    before = description.data_parallel_size or 0
    ranks = [parallel.data_parallel_rank()] if before == parallel.data_parallel_size() else range(before)
    paths = {rank: folder / f"data_{rank:05d}.pt" for rank in ranks}
    missing = [path for path in paths.values() if not path.exists()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing: the data position is lost; resume from an older checkpoint")
    with readable(checkpoint):
        return {rank: torch.load(path, weights_only=True) for rank, path in paths.items()}
