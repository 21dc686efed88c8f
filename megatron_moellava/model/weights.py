"""Where an expert meets a checkpoint: a model of any layout filled from one; training/checkpoint.py writes them."""

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moellava import parallel
from megatron_moellava.checkpoint.description import ANEW, read_description
from megatron_moellava.checkpoint.integrity import DamagedCheckpoint
from megatron_moellava.checkpoint.safe_pickle import guard
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.config import CheckpointError
from megatron_moellava.costs.adapters import PREFIX as ADAPTER_PREFIX
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.towers.branches import branch_problems
from megatron_moellava.validation.checkpoints import differing_fields

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

guard()
EXPERT_BIAS = ".router.expert_bias"
UNUSED_TOWER = "vision_tower.unused."  # tensors of the published tower that features do not need; they ride along


def model_state(chunks: list[MoELlava]) -> dict:
    """Sharded tensors of the model by local name; names of virtual stages are told apart by a prefix."""
    metadata = {
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {}
    for index, chunk in enumerate(chunks):
        for name, value in chunk.sharded_state_dict(metadata=metadata).items():
            if not is_bookkeeping(name):
                state[f"chunk{index}.{name}"] = value
    return state


def kept_state(chunks: list[MoELlava]) -> dict:
    """The part of `model_state` that a checkpoint of a run holds: beside adapters only what is trained."""
    state = model_state(chunks)
    if chunks[0].adapters is None:
        return state
    trained = set()
    for index, chunk in enumerate(chunks):
        roles = {role for role, _, parameter in parameter_roles(chunk) if parameter.requires_grad}
        trained |= {f"chunk{index}.{name}" for role, name, _ in parameter_roles(chunk) if role in roles}
        if "router" in roles:
            trained |= {name for name in state if name.startswith(f"chunk{index}.") and name.endswith(EXPERT_BIAS)}
    return {name: value for name, value in state.items() if name in trained}


def is_bookkeeping(name: str) -> bool:
    """Transformer Engine's FP8 state, rebuilt in a few steps: `_extra_state`, and of grouped experts `_extra_state1`, ..."""
    return name.rpartition(".")[2].startswith("_extra_state")


def load_with_base(
    checkpoint: Path, chunks: list[MoELlava], base: Path | None, verified: bool = False, base_verified: bool = False
) -> None:
    """Fill the model from a checkpoint, and before that from the base that an adapter checkpoint needs. Collective."""
    if base is not None:
        load_weights(base, chunks, base_verified)
    load_weights(checkpoint, chunks, verified)


def load_weights(checkpoint: Path, chunks: list[MoELlava], verified: bool = False) -> None:
    """Fill the model from a checkpoint of any layout. Collective.

    `verified`: the files have been compared with their digests, or the user does without. Raises CheckpointError that
    lists every file that is damaged, or every field and tensor that differs.

    An adapter checkpoint fills the adapters and what was trained whole beside them, any other all but the adapters.
    """
    description = read_description(checkpoint) if verified else verify_checkpoint(checkpoint, together=True)
    state, model = model_state(chunks), chunks[0]
    with readable(checkpoint):
        stored = _stored_tensors(checkpoint)
    is_adapter = description.adapter is not None
    state = {
        name: value
        for name, value in state.items()
        if value.key.startswith(ADAPTER_PREFIX) == is_adapter or (is_adapter and value.key in stored)
    }
    fresh = set() if is_adapter else _fresh_biases(description.model, state, stored)
    _check_tensors(
        checkpoint,
        state,
        stored,
        [
            *differing_fields(description.model, model.sizes()),
            *branch_problems(description.model, model.branches),
        ],
    )
    with readable(checkpoint):
        if not is_adapter:
            _carry_unused_tower(checkpoint, chunks[0], stored)
        loaded = dist_checkpointing.load({"model": state}, str(checkpoint))["model"]
    for index, chunk in enumerate(chunks):
        prefix = f"chunk{index}."
        own = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
        problems = chunk.load_state_dict(own, strict=False)
        missing = [name for name in problems.missing_keys if f"{prefix}{name}" in state.keys() - fresh]
        assert not missing and not problems.unexpected_keys, (missing, problems.unexpected_keys)


def _fresh_biases(described: dict, state: dict, stored: dict[str, tuple[int, ...]]) -> set[str]:
    """Take expert biases that a checkpoint of a run without them lacks out of `state`: they start at zero. Their names."""
    if (described.get("moe") or {}).get("moe_router_enable_expert_bias"):
        return set()
    keys = {name: value.key for name, value in state.items() if name.endswith(EXPERT_BIAS)}
    fresh = {name for name, key in keys.items() if key not in stored}
    for name in fresh:
        del state[name]
    if keys and fresh:
        parallel.say(
            "note: the checkpoint has no expert biases (moe.moe_router_enable_expert_bias): they start at zero. The router's "
            "scores become sigmoids instead of a softmax, so the weights of the chosen experts change"
        )
    return fresh


@contextlib.contextmanager
def readable(checkpoint: Path) -> Iterator[None]:
    """What the libraries raise over files that are no checkpoint becomes a DamagedCheckpoint.

    Only files that were not verified come so far: those of an older version without digests, and of --no-verify.
    """
    try:
        yield
    except (*_UNREADABLE, RuntimeError) as error:
        if not isinstance(error, _UNREADABLE) and "PytorchStreamReader" not in str(error):
            raise  # a rank that died, memory: no fault of the checkpoint
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DamagedCheckpoint(f"{checkpoint} cannot be read ({reason}); {ANEW}") from error


_UNREADABLE = (
    CheckpointingException,
    CheckpointException,
    FileNotFoundError,
    EOFError,
    json.JSONDecodeError,
    pickle.UnpicklingError,
)


def _stored_tensors(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return {name: tuple(value.global_shape) for name, value in metadata.items() if not name.startswith("optimizer.")}


def _check_tensors(checkpoint: Path, state: dict, stored: dict[str, tuple[int, ...]], fields: list[str]) -> None:
    """Compare keys and shapes of the whole model (over all stages and experts) with the checkpoint's."""
    here = {value.key: _shape(value) for value in nested_values(state) if isinstance(value, ShardedBase)}
    everywhere: list[dict[str, tuple[int, ...] | None]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    wanted = {name: shape for rank in everywhere for name, shape in rank.items()}
    surplus = {name for name in stored if not name.startswith(UNUSED_TOWER)} - wanted.keys()
    missing = wanted.keys() - stored.keys()
    other = {
        f"{name} {stored[name]} there, {shape} here"
        for name, shape in wanted.items()
        if shape is not None and name in stored and stored[name] != shape
    }
    if fields or missing or surplus or other:
        raise CheckpointError(
            f"{checkpoint} does not fit this model.\n  other fields: {'; '.join(fields) or 'none'}\n"
            f"  missing: {_some(missing)}\n  not wanted: {_some(surplus)}\n"
            f"  other shape: {_some(other)}\n"
            "  A dense checkpoint becomes a MoE one with `moellava convert upcycle`; `moellava convert inspect` shows it."
        )


def _shape(value: ShardedBase) -> tuple[int, ...] | None:
    """The whole tensor's shape; None where vocabulary padding may change it, and for what is split up later (gated fc1)."""
    fixed = isinstance(value, ShardedTensor) and not value.allow_shape_mismatch
    return tuple(value.global_shape) if fixed else None


def _some(names: set[str], limit: int = 12) -> str:
    listed = sorted(names)
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + rest


def _carry_unused_tower(checkpoint: Path, model: MoELlava, stored: dict[str, tuple[int, ...]]) -> None:
    """Keep the tower's unneeded tensors on the CPU, so that an export of this run is complete."""
    names = [name for name in stored if name.startswith(UNUSED_TOWER)]
    wanted = {}
    metadata = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    for name in names:
        empty = torch.empty(stored[name], dtype=metadata[name].dtype)
        wanted[name] = ShardedTensor.from_rank_offsets(name, empty, replica_id=dist.get_rank())
    model.unused_tower_tensors = (
        dist_checkpointing.load({"unused": wanted}, str(checkpoint))["unused"] if wanted else {}
    )
