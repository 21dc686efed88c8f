"""Counting instead of guessing: bytes of tensors, bytes that autograd keeps, FLOPs of the operations really called.

Works on real and on fake tensors alike: a storage is counted once, whoever holds it.
"""

from collections.abc import Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_moellava.training.optimizer import distributed_optimizers

aten = torch.ops.aten


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def optimizer_bytes(optimizer, buffers: Iterable) -> int:
    """Adam's moments as they are after a step, and the fp32 copies of parameters where those are not in `buffers`."""
    own = {buffer.param_data.untyped_storage()._cdata for buffer in buffers}
    tensors: list[torch.Tensor] = []
    for part in distributed_optimizers(optimizer):
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors += [shard for group in part.optimizer.param_groups for shard in group["params"]]
    kept = (tensor for tensor in tensors if torch.is_tensor(tensor))
    return storage_bytes(tensor for tensor in kept if tensor.untyped_storage()._cdata not in own)


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Within this context everything that autograd keeps for backward is noted, except `excluded` (the parameters)."""

    def __init__(self, excluded: Iterable[torch.Tensor] = ()):
        self.excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that an address is not reused
        super().__init__(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.excluded:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes of what was saved, each storage once."""
        return sum(storage.nbytes() for storage in self.storages.values())


def _grouped_product(first, second, *_, out_shape=None, **__) -> int:
    """[N, I] x [E, I, O] sorted by expert, or its weight gradient [I, N] x [N, O]: 2 N I O either way."""
    return 2 * first[0] * first[1] * second[-1]


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    batch, heads, queries, channels = query
    return 4 * batch * heads * queries * key[-2] * channels


def _attention_backward(grad, query, key, *_, out_shape=None, **__) -> int:
    return 5 * _attention(query, key, None) // 2


def flop_counter() -> FlopCounterMode:
    """torch's counter, which lacks grouped products and the CPU's flash attention."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._grouped_mm: _grouped_product,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )
