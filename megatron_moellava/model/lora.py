"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear layers of a built model: W x + scale * B A x.

`costs/adapters.py` says which matrices get one and of which shapes; here they are cut for this rank and computed. An
adapter listens to its layer (a forward hook), so the layer, its collectives and its checkpoints stay what they are, and
the adapters lie in one module of their own. What ranks exchange for an adapter is r wide:

    column-parallel   A whole, B cut by outputs; under sequence parallelism A x is gathered, not x
    row-parallel      A cut by inputs, A x summed (or reduce-scattered), B whole
    experts           grouped products over the experts of this rank; partial sums leave with the experts' own

Shapes: I inputs, O outputs, R rank, P projections in a matrix, E experts of this rank, N rows sorted by expert.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from megatron_moellava import platform
from megatron_moellava.config import LoraConfig, RunConfig
from megatron_moellava.costs.adapters import PREFIX, Adapted, adapted_matrices, b_name
from megatron_moellava.costs.shapes import EXPERTS, LANGUAGE, ModelTensor
from megatron_moellava.mapping import Shape
from megatron_moellava.model.grouped_products import grouped_product

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

ALIGNMENT = 8  # grouped products want rows of a multiple of 16 bytes: ranks are filled up with zeros to it


# What ranks exchange of A x, by the axis of W that they divide and whether they divide the positions too.
EXCHANGES: dict[tuple[int, bool], Callable] = {
    (0, False): copy_to_tensor_model_parallel_region,
    (0, True): gather_from_sequence_parallel_region,
    (1, False): reduce_from_tensor_model_parallel_region,
    (1, True): reduce_scatter_to_sequence_parallel_region,
}


class Adapter(MegatronModule):
    """The adapter of one matrix, or of one matrix of all experts of this rank. Its own forward pass is scale * B A x."""

    a: torch.nn.Parameter

    def __init__(self, adapted: Adapted, lora: LoraConfig, config: TransformerConfig, seed: int):
        super().__init__(config=config)
        self.adapted, self.lora = adapted, lora
        self.is_expert = adapted.experts > 0
        self.group = (
            parallel_state.get_expert_tensor_parallel_group()
            if self.is_expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        self.sequence_parallel = config.sequence_parallel and self.group.size() > 1 and not self.is_expert
        self.whole = adapted.tensors(lora)
        for key, tensor in self.whole.items():
            name = f"{PREFIX}{adapted.name}.{key}"
            values = _initial(name, tensor.shape, seed) if key == "a" else torch.zeros(tensor.shape)
            self.register_parameter(key, self._parameter(tensor, values))

    def _parameter(self, tensor: ModelTensor, whole: torch.Tensor) -> torch.nn.Parameter:
        """This rank's share of a whole tensor."""
        for axis, rank, size in self._cuts(tensor):
            whole = whole.chunk(size, axis)[rank]
        own = torch.nn.Parameter(whole.to(platform.device(), self.config.params_dtype).contiguous())
        if tensor.split is not None:
            set_tensor_model_parallel_attributes(own, is_parallel=True, dim=tensor.split, stride=1)
        own.allreduce = not tensor.is_expert  # type: ignore[attr-defined]
        # Copies that see other tokens on each tensor-parallel rank: Megatron-Core adds up their gradients.
        is_copy = tensor.split is None and not tensor.is_expert
        own.sequence_parallel = self.config.sequence_parallel and is_copy  # type: ignore[attr-defined]
        return own

    def _cuts(self, tensor: ModelTensor) -> Iterator[tuple[int, int, int]]:
        """(axis, rank, ranks) of everything that divides a tensor."""
        if tensor.is_expert:
            yield (
                0,
                parallel_state.get_expert_model_parallel_rank(),
                parallel_state.get_expert_model_parallel_world_size(),
            )
        if tensor.split is not None:
            yield tensor.split, self.group.rank(), self.group.size()

    def forward(self, input: torch.Tensor, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor:
        """[..., I] of this rank -> what is added to the layer's output [..., O]; of experts with their counts of rows."""
        input = self._dropped(input)
        if self.is_expert:
            assert tokens_per_expert is not None
            return self._of_experts(input, tokens_per_expert)
        inner = F.linear(input, self.a.to(input.dtype))  # [..., P R]
        if self.adapted.split is not None:
            inner = EXCHANGES[self.adapted.split, self.sequence_parallel](inner, group=self.group)
        parts = inner.chunk(len(self.adapted.parts), dim=-1)
        outputs = [F.linear(part, b.to(input.dtype)) for part, b in zip(parts, self.bs(), strict=True)]
        return fused(self.adapted, outputs) * self.lora.scale

    def bs(self) -> list[torch.nn.Parameter]:
        """The B of each projection."""
        return [getattr(self, b_name(part)) for part, _ in self.adapted.parts]

    def _of_experts(self, input_NI: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        product = partial(
            _expert_product, tokens_per_expert=torch.as_tensor(tokens_per_expert)
        )  # a list beside Transformer Engine
        a = self._whole_gradient("a").unflatten(-2, (len(self.adapted.parts), self.lora.rank))
        missing = -self.lora.rank % ALIGNMENT
        a = filled_up(a, (0, 0, 0, missing)).flatten(-3, -2)
        parts = product(input_NI, a).chunk(len(self.adapted.parts), dim=-1)
        names = [b_name(part) for part, _ in self.adapted.parts]
        bs = [filled_up(self._whole_gradient(name), (0, missing)) for name in names]
        outputs = [product(part, b) for part, b in zip(parts, bs, strict=True)]
        return fused(self.adapted, outputs) * self.lora.scale

    def _whole_gradient(self, key: str) -> torch.Tensor:
        """A tensor that all ranks of expert tensor parallelism hold sees a share of each sum: its gradient is added up."""
        tensor, value = self.whole[key], getattr(self, key)
        if self.group.size() > 1 and tensor.is_expert and tensor.split is None:
            return copy_to_tensor_model_parallel_region(value, group=self.group)
        return value

    def _dropped(self, input: torch.Tensor) -> torch.Tensor:
        """Ranks that hold other tokens or channels draw from a generator of their own, as Megatron-Core's dropout does."""
        if not self.training or self.lora.dropout == 0.0:
            return input
        if self.group.size() == 1 or (self.adapted.split == 0 and not self.sequence_parallel):
            return F.dropout(input, self.lora.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(input, self.lora.dropout)

    def delta(self) -> torch.Tensor:
        """scale * B A in fp32, as the layer's own weight lies on this rank: [O, I], of experts [E, O, I]."""
        parts = self.a.float().unflatten(-2, (len(self.adapted.parts), self.lora.rank)).unbind(-3)
        products = [b.float() @ a for a, b in zip(parts, self.bs(), strict=True)]
        rows = [product.transpose(-1, -2) for product in products]  # `fused` puts the last axis in order
        return fused(self.adapted, rows).transpose(-1, -2) * self.lora.scale

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One entry per parameter, under a name that no layout changes."""
        state = {}
        for key, tensor in self.whole.items():
            copies = (
                parallel_state.get_expert_data_parallel_rank()
                if tensor.is_expert
                else parallel_state.get_data_parallel_rank(with_context_parallel=True)
            )
            group = self.group if tensor.is_expert else parallel_state.get_tensor_model_parallel_group()
            state[f"{prefix}{key}"] = ShardedTensor.from_rank_offsets(
                f"{PREFIX}{self.adapted.name}.{key}",
                getattr(self, key),
                *self._cuts(tensor),
                replica_id=(0, 0 if tensor.split is not None else group.rank(), copies),
            )
        return state


def filled_up(matrix: torch.Tensor, missing: tuple[int, ...]) -> torch.Tensor:
    """`matrix` with zeros beyond its last axes, as torch's pad counts them. Where nothing is missing pad would copy it."""
    return F.pad(matrix, missing) if any(missing) else matrix


def fused(adapted: Adapted, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Outputs of the projections [..., o] -> of Megatron's fused matrix [..., O].

    q, k and v lie by query group: 4 heads in 2 groups, [q0 q1 q2 q3], [k0 k1], [v0 v1] -> [q0 q1 k0 v0 q2 q3 k1 v1].
    """
    if adapted.heads is None:
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
    groups = outputs[1].shape[-1] // adapted.heads.kv_channels  # of this rank
    return torch.cat([output.unflatten(-1, (groups, -1)) for output in outputs], dim=-1).flatten(-2)


def _expert_product(input_NI: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
    """With the weights [E, O, I] of each expert, or the one [O, I] of all."""
    return F.linear(input_NI, weight) if weight.dim() == 2 else grouped_product(input_NI, weight, tokens_per_expert)


def _initial(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """A's first values, as `peft` draws them: U(-1/sqrt(I), 1/sqrt(I)); the whole tensor, from its name and the seed alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Adapters(MegatronModule):
    """All adapters of one chunk of the model, by the whole model's name of their matrix ("/" for ".")."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        self.hooks: list = []

    def add(self, adapter: Adapter) -> None:
        """Keep an adapter."""
        self.add_module(adapter.adapted.name.replace(".", "/"), adapter)

    def __iter__(self) -> Iterator[Adapter]:
        return (child for child in self.children() if isinstance(child, Adapter))

    def has_role(self, role: str) -> bool:
        """Whether matrices of this role have adapters."""
        return any(adapter.adapted.role == role for adapter in self)


def attach(model, run: RunConfig) -> Adapters | None:
    """Put the adapters of `training.lora` beside the layers of a built chunk (MoELlava); None where the run has none."""
    lora = run.training.lora
    if lora is None:
        return None
    adapters = Adapters(model.config)
    for adapted in adapted_matrices(model.sizes(), lora):
        module = _module(model, adapted.name)
        if module is None:
            continue  # of another pipeline stage
        # The layers of the tower and the projector are never sequence-parallel.
        config = model.config if adapted.name.startswith(LANGUAGE) else module.config
        adapter = Adapter(adapted, lora, config, run.training.seed)
        adapters.add(adapter)
        adapters.hooks += list(_listen(adapter, module))
    return adapters


def _module(model, name: str):
    """The module of a matrix of the whole model; None when another rank holds it."""
    parts = name.split(".")
    if name.startswith(f"{LANGUAGE}decoder.layers."):
        layers = {layer.layer_number - 1: layer for layer in model.language_model.decoder.layers}
        module, parts = layers.get(int(parts[3])), parts[4:]
    else:
        module = model if model.pre_process else None
    if EXPERTS in name:
        parts = [*".".join(parts).partition(EXPERTS)[0].split(".")[:-1], "experts", parts[-1]]
    for part in parts:
        if module is not None and hasattr(module, "local_experts") and part.startswith("linear_"):
            return [getattr(expert, part) for expert in module.local_experts]
        module = None if module is None else getattr(module, part)
    return module


def _listen(adapter: Adapter, module) -> Iterator:
    """Add the adapter's output to the module's. Handles to undo it."""
    if isinstance(module, list):  # experts that compute one after the other
        for number, expert in enumerate(module):
            yield expert.register_forward_hook(partial(_add_of_one_expert, adapter, number, len(module)))
    elif adapter.adapted.name.endswith("router"):
        module.gating = partial(_adapted_gating, module.gating, adapter)
    else:
        yield module.register_forward_hook(partial(_add, adapter))


def _add(adapter: Adapter, module, inputs: tuple, output: tuple):
    value, *rest = output
    return (value + adapter(*inputs[: 2 if adapter.is_expert else 1]), *rest)


def _add_of_one_expert(adapter: Adapter, number: int, experts: int, module, inputs: tuple, output: tuple):
    value, *rest = output
    counts = torch.tensor([len(inputs[0]) if index == number else 0 for index in range(experts)])
    return (value + adapter(inputs[0], counts), *rest)


def _adapted_gating(gating, adapter: Adapter, input_SBH: torch.Tensor) -> torch.Tensor:
    logits_SBE = gating(input_SBH)
    return logits_SBE + adapter(input_SBH.to(logits_SBE.dtype))


def merge(model) -> None:
    """Add every adapter's product to the weight that it stands beside, and take the adapters away."""
    with torch.no_grad():
        for adapter in model.adapters:
            _merge(adapter, _module(model, adapter.adapted.name))
    for hook in model.adapters.hooks:
        hook.remove()
    model.adapters = None


def _merge(adapter: Adapter, module) -> None:
    delta = adapter.delta()
    if adapter.adapted.name.endswith("router"):
        del module.gating  # the class's own again
    if not adapter.is_expert:
        weights, deltas = [module.weight], [delta]
    elif isinstance(module, list):
        weights, deltas = [expert.weight for expert in module], list(delta)
    else:
        weights, deltas = [getattr(module, f"weight{number}") for number in range(len(delta))], list(delta)
    for weight, own in zip(weights, deltas, strict=True):
        weight.copy_(weight.float() + own)
