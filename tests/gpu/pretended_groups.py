"""torch.distributed with nccl's rules over gloo: a group that is not gloo's by name takes tensors of the GPU only."""

import pickle

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.utils._pytree import tree_leaves

from tests.gpu.pretended import on_gpu, place, tag, untag

CHECKED = (
    *("all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce_scatter"),
    *("all_to_all", "send", "recv", "gather", "scatter"),
)
_gloo: list = []  # groups that were asked for as gloo's; kept, so that no other gets their address


class NoBackend(RuntimeError):
    """What a group says to tensors of a device that its backend does not serve."""


def check(what: str, arguments, group) -> None:
    if any(group is known for known in _gloo):
        return
    for item in tree_leaves(arguments):
        if isinstance(item, torch.Tensor) and not on_gpu(item):
            raise NoBackend(
                f"No backend type associated with device type cpu: {what} of a {tuple(item.shape)} tensor on nccl at {place()}"
            )


class Pickler(pickle.Pickler):
    """Objects that travel: a tensor of the GPU arrives as one."""

    def reducer_override(self, item):
        if isinstance(item, torch.Tensor) and on_gpu(item):
            return tag, (untag(item.detach().clone()),)
        return NotImplemented


def install_groups() -> None:
    init, new_group = dist.init_process_group, dist.new_group
    all_gather, all_to_all_single, barrier, get_backend = (
        dist.all_gather,
        dist.all_to_all_single,
        dist.barrier,
        dist.get_backend,
    )

    def pretended_init(backend=None, device_id=None, **options) -> None:
        init("gloo", **options)

    def pretended_group(ranks=None, timeout=None, backend=None, **options):
        kept = {key: options[key] for key in ("use_local_synchronization", "group_desc") if key in options}
        group = new_group(ranks=ranks, timeout=timeout, backend="gloo", **kept)
        if backend is not None and "gloo" in str(backend):
            _gloo.append(group)
        return group

    def checked(name: str):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            groups = [item for item in (*args, kwargs.get("group")) if isinstance(item, dist.ProcessGroup)]
            check(name, (args, kwargs), groups[-1] if groups else None)
            return original(*args, **kwargs)

        setattr(dist, name, call)

    def gather_all(outputs, tensor, group=None, async_op=False):
        check("all_gather", [*outputs, tensor], group)
        if len({output.shape for output in outputs}) == 1:
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(len(output) for output in outputs), *tensor.shape[1:])  # gloo wants equal sizes
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in outputs]
        all_gather(gathered, padded, group=group)
        for output, item in zip(outputs, gathered, strict=True):
            output.copy_(item[: len(output)])
        return None

    def exchange(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        check("all_to_all_single", [output, input], group)
        sizes = [None if item is None else [int(n) for n in item] for item in (output_split_sizes, input_split_sizes)]
        return all_to_all_single(output, input, *sizes, group=group, async_op=async_op)

    for name in CHECKED:
        checked(name)
    dist.init_process_group, dist.new_group = pretended_init, pretended_group
    dist.all_gather, dist.all_to_all_single = gather_all, exchange
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group=group, async_op=async_op)
    dist.get_backend = lambda group=None: get_backend(group) if any(group is known for known in _gloo) else "nccl"
    c10d._pickler = Pickler
