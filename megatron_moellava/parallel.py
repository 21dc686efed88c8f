"""Process groups of a run and the few questions about ranks that the rest asks.

Ranks are laid out by megatron-core's order tp-cp-ep-dp-pp; the data-parallel size is what remains of the world.
"""

import datetime
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import megatron_moellava.platform as platform
from megatron_moellava.config import ParallelConfig

from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler


def initialize(config: ParallelConfig, seed: int) -> None:
    """Join the processes that torchrun started (or run as the only one), build the groups, seed every generator.

    Called again, it replaces the groups of the layout before, or keeps them when it is the same layout.
    """
    global _layout
    platform.claim_device(int(os.environ.get("LOCAL_RANK", 0)))
    # The watchdog, which can say who hangs where, speaks first; a collective gives up only if it does not.
    minutes = 1.5 * config.distributed_timeout_minutes + 0.5
    if _layout != config or not dist.is_initialized():
        _forget_layout()
        _build_groups(config, minutes)
        _layout = config
    _forget_losses()
    platform.seed_everything(seed)
    seed_model_parallel(seed)


_layout: ParallelConfig | None = None  # of the groups that there are
_host_group: dist.ProcessGroup | None = None  # all ranks, for numbers of the host; None: the world group will do


def _build_groups(config: ParallelConfig, minutes: float) -> None:
    global _host_group
    timeout = datetime.timedelta(minutes=minutes)
    if not dist.is_initialized():
        alone = "WORLD_SIZE" not in os.environ
        where: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group(platform.BACKEND, timeout=timeout, **where)
    if platform.BACKEND != "gloo" and _host_group is None:
        group = dist.new_group(backend="gloo", timeout=timeout)
        _host_group = group  # type: ignore[assignment]  # every rank belongs to it
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size or 1,
        distributed_timeout_minutes=minutes,
    )


def shutdown() -> None:
    """Undo of `initialize`; a process may then build another layout."""
    global _host_group
    _forget_layout()
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _forget_layout() -> None:
    global _layout
    parallel_state.destroy_model_parallel()
    _forget_losses()
    _layout = None


def _forget_losses() -> None:
    """What megatron-core keeps of the router losses' scale for the life of a process."""
    # In the shape of whoever set it first: a backward pass outside of a schedule makes it a scalar, into which the next
    # schedule's [1] does not fit.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def seed_model_parallel(seed: int) -> None:
    """Seed megatron-core's trackers: dropout and initial weights differ between the shards of one tensor."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def data_parallel_rank() -> int:
    """This process's place among those that read different data."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """How many processes read different data."""
    return parallel_state.get_data_parallel_world_size()


def context_parallel_rank() -> int:
    """This process's place among those that share the positions of a row."""
    return parallel_state.get_context_parallel_rank()


def context_parallel_size() -> int:
    """Over how many processes a row is cut."""
    return parallel_state.get_context_parallel_world_size()


def num_stages() -> int:
    """Number of pipeline stages (ranks, not virtual chunks)."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def is_first_stage() -> bool:
    """Whether this rank embeds tokens and images, whichever virtual chunk is running."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def is_last_stage() -> bool:
    """Whether this rank has logits and loss, whichever virtual chunk is running."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def is_main_process() -> bool:
    """The process that prints and writes logs: the last rank, whose pipeline stage knows the loss."""
    return dist.get_rank() == dist.get_world_size() - 1


def speaks_for_its_replicas() -> bool:
    """One rank of the last pipeline stage's tensor- and context-parallel ones, where all of these know the same."""
    return is_last_stage() and not (
        parallel_state.get_tensor_model_parallel_rank() or parallel_state.get_context_parallel_rank()
    )


def say(text: str) -> None:
    """Print on the main process only."""
    if is_main_process():
        print(text, flush=True)


def reads_data() -> bool:
    """One process of each data-parallel rank reads the data and broadcasts it to the others of its model."""
    return _leads_model_parallel_group() and context_parallel_rank() == 0


def _leads_model_parallel_group() -> bool:
    return dist.get_rank() == dist.get_process_group_ranks(parallel_state.get_model_parallel_group())[0]


def sum_over_data_parallel(value: torch.Tensor) -> torch.Tensor:
    """fp64 sum of a number of the device over all that share the batch (context-parallel ranks have parts of its rows).

    Queued behind the work that makes the number: the host does not wait for it.
    """
    total = value.detach().to(torch.float64, copy=True)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total


def gather_over_data_parallel(values: Iterable[int]) -> list[list[int]]:
    """`[ranks][values]`: the host's numbers of every data-parallel rank, on every rank of the group.

    They go over the host's network (gloo), so that the device is not waited for.
    """
    own = torch.tensor(list(values), dtype=torch.int64)
    gathered = own.new_empty(data_parallel_size(), len(own))
    dist.all_gather(list(gathered.unbind()), own, group=parallel_state.get_data_parallel_group_gloo())
    return gathered.tolist()


def sum_over_ranks(values: Iterable[int]) -> list[int]:
    """The host's numbers summed over all ranks of the world, on every rank; likewise over the host's network."""
    sums = torch.tensor(list(values), dtype=torch.int64)
    dist.all_reduce(sums, group=_host_group)
    return sums.tolist()


def common_choice(own: str, choices: Sequence[str], otherwise: str) -> str:
    """What every process of the world has chosen among `choices`, or `otherwise` where they differ; collective."""
    counts = sum_over_ranks([own == choice for choice in choices])
    return own if counts[choices.index(own)] == dist.get_world_size() else otherwise


def sum_floats_over_ranks(values: Iterable[float]) -> list[float]:
    """`sum_over_ranks` of numbers that are not whole, in fp64."""
    sums = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(sums, group=_host_group)
    return sums.tolist()


def broadcast_from_reader(tensors: dict[str, torch.Tensor | None] | None, meta: object = None) -> tuple[dict, object]:
    """Send named tensors (None allowed) and a small picklable `meta` from the reading process to all ranks of its model.

    Returns the tensors on this process's device, and meta. A group of one moves nothing. Megatron-Core's model-parallel
    groups leave out the context-parallel axis: the leaders of these groups receive first.
    """
    if _leads_model_parallel_group():
        tensors, meta = _broadcast(tensors, meta, parallel_state.get_context_parallel_group())
    return _broadcast(tensors, meta, parallel_state.get_model_parallel_group())


def broadcast_on_first_stage(tensors: dict[str, torch.Tensor | None] | None) -> dict:
    """The same among the ranks of the first stage, for what only that stage needs (pixels)."""
    if _leads_model_parallel_group():
        tensors, _ = _broadcast(tensors, None, parallel_state.get_context_parallel_group())
    return _broadcast(tensors, None, parallel_state.get_tensor_model_parallel_group())[0]


def _broadcast(tensors, meta, group) -> tuple[dict, object]:
    if group.size() == 1:
        return {name: value if value is None else platform.on_device(value) for name, value in tensors.items()}, meta
    source = dist.get_process_group_ranks(group)[0]
    header: list = [None]
    if tensors is not None:
        header = [
            ({name: value if value is None else (value.shape, value.dtype) for name, value in tensors.items()}, meta)
        ]
    dist.broadcast_object_list(header, src=source, group=group)
    shapes, meta = header[0]
    received: dict[str, torch.Tensor | None] = {}
    for name, shape in shapes.items():
        if shape is None:
            received[name] = None
            continue
        size, dtype = shape
        if tensors is None:
            value = torch.empty(size, dtype=dtype, device=platform.device())
        else:
            value = platform.on_device(tensors[name]).contiguous()
        if value.numel():
            dist.broadcast(value, src=source, group=group)
        received[name] = value
    return received, meta
