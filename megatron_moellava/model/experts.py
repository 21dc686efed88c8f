"""Where a token meets an expert: linear layers of all local experts over grouped products, and the MLP of two of them.

Megatron-core's TEGroupedMLP accepts any pair of builders with the interface of Transformer Engine's GroupedLinear.
Shapes: N tokens sorted by expert, E local experts, I input and O output features of this shard. Counts of tokens may lie on
the device: nothing here waits for them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import megatron_moellava.platform as platform
from megatron_moellava.compiled import compiles, fusible
from megatron_moellava.model.grouped_products import (
    Counts,
    counts_of,
    for_each_row,
    grouped_product,
    on_device,
    product_of_separate,
)

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide

BLOCK = 2**17  # entries whose rows, in fp32 and with their gradients, stay in a core's second cache


class GroupedLinear(MegatronModule):
    """E linear layers in one product. One parameter per expert (`weight0`, `weight1`, ...), as Transformer Engine has.

    `partition_dim` is the weight axis that expert tensor parallelism splits: 0 for fc1 (columns), 1 for fc2 (rows,
    whose partial sums the token dispatcher reduces).
    """

    partition_dim: int

    def __init__(
        self,
        num_experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        pg_collection: ProcessGroupCollection,
        tp_comm_buffer_name: str | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        assert is_expert
        self.num_experts, self.skip_bias_add, self.pg_collection = num_experts, skip_bias_add, pg_collection
        self.fused: dict[str, torch.Tensor] = {}
        split = pg_collection.expt_tp.size()
        assert not (bias and split > 1), "megatron-core refuses biased experts with expert tensor parallelism"
        size = (
            [divide(output_size, split), input_size]
            if self.partition_dim == 0
            else [output_size, divide(input_size, split)]
        )
        device = platform.device()
        for index in range(num_experts):
            weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.partition_dim, stride=1)
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)
            self._add(f"weight{index}", weight)
            if bias:
                self._add(
                    f"bias{index}", torch.nn.Parameter(torch.zeros(size[0], dtype=config.params_dtype, device=device))
                )
        self.use_bias = bias

    def _add(self, name: str, parameter: torch.nn.Parameter) -> None:
        parameter.allreduce = False  # type: ignore[attr-defined]  # reduced over the expert-data-parallel group, also where that is all of the group
        self.register_parameter(name, parameter)

    def fuse(self) -> None:
        """Lay the experts' parameters into one tensor, once, instead of stacking them at every call: for inference.

        fc2's lie side by side, [O, E, I] in memory, so that all experts of a token are also one product over (E, I).
        """
        for name in ("weight", "bias") if self.use_bias else ("weight",):
            self.fused[name] = self.stacked(name).detach()
            if self.partition_dim == 1 and name == "weight":
                self.fused[name] = self.fused[name].transpose(0, 1).contiguous().transpose(0, 1)
            for index, part in enumerate(self.fused[name]):
                getattr(self, f"{name}{index}").data = part
        side = self.fused["weight"]  # all experts as one matrix: [E O, I] of fc1, [O, E I] of fc2
        self.fused["matrix"] = side.flatten(0, 1) if self.partition_dim == 0 else side.transpose(0, 1).flatten(1)

    def stacked(self, name: str) -> torch.Tensor:
        """[E, ...], the experts' `weight` or `bias` in one tensor."""
        if name in self.fused:
            return self.fused[name]
        return torch.stack(self._separate(name))

    def _separate(self, name: str) -> list[torch.Tensor]:
        return [getattr(self, f"{name}{index}") for index in range(self.num_experts)]

    def forward(self, input_NI: torch.Tensor, tokens_per_expert: Counts) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N, I] sorted by expert -> [N, O], and the biases [E, O] if the caller adds them (weighted by the router)."""
        output_NO = self.product(input_NI, tokens_per_expert)
        if not self.use_bias:
            return output_NO, None
        if self.skip_bias_add:
            return output_NO, self.stacked("bias")
        bias_NO = for_each_row(self.stacked("bias"), tokens_per_expert, len(input_NI))
        return (output_NO + bias_NO).to(output_NO.dtype), None

    def product(self, input_NI: torch.Tensor, counts_E: Counts) -> torch.Tensor:
        """[N, I] sorted by expert -> [N, O], without biases. `fp8_emulation.py` puts another one in its place."""
        if "weight" in self.fused:
            return grouped_product(input_NI, self.fused["weight"], counts_E)
        return product_of_separate(input_NI, self._separate("weight"), counts_E)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """One entry per expert under the key of the sequential experts, so that both read each other's checkpoints."""
        first, total = self.pg_collection.ep.rank() * self.num_experts, self.pg_collection.ep.size() * self.num_experts
        assert metadata is not None
        state = {}
        for name in ("weight", "bias") if self.use_bias else ("weight",):
            for index in range(self.num_experts):
                offsets = (*sharded_offsets, (len(sharded_offsets), first + index, total))
                sharded = make_sharded_tensors_for_checkpoint(
                    {name: getattr(self, f"{name}{index}")},
                    prefix,
                    {"weight": self.partition_dim, "bias": 0},
                    offsets,
                    tp_group=self.pg_collection.expt_tp,
                    dp_cp_group=metadata["dp_cp_group"],
                )[f"{prefix}{name}"]
                sharded.replica_id = (*sharded.replica_id[:2], self.pg_collection.expt_dp.rank())
                state[f"{prefix}{name}{index}"] = sharded
        return state


class GroupedColumnLinear(GroupedLinear):
    """fc1 of every local expert: the output features are split."""

    partition_dim = 0


class GroupedRowLinear(GroupedLinear):
    """fc2 of every local expert: the input features are split."""

    partition_dim = 1


class GroupedMLP(TEGroupedMLP):
    """fc1, activation times routing weight and fc2 of every local expert.

    Megatron-core's own forward, but for the activation, which works on all rows at once and whose fused form knows SwiGLU
    alone, for its recomputation (`moe_act`), and for the counts, which it wants on the host.
    """

    def forward(
        self, hidden_NH: torch.Tensor, tokens_per_expert: Counts, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """[N, H] sorted by expert -> [N, H], each row times its weight in fp32."""
        counts_E, weights_N1 = counts_of(tokens_per_expert), weights_N.unsqueeze(-1)
        inner_NO, _ = self.linear_fc1(hidden_NH, counts_E)
        activate = partial(weighted_activation, self.config.activation_func, self.config.gated_linear_unit)
        inner_NI = WeightedActivation.apply(
            inner_NO, weights_N1, self.config.activation_func, self.config.gated_linear_unit
        )
        again = partial(activate, inner_NO.detach(), weights_N1.detach())
        with made_again(inner_NI, again) if self.activation_recompute else nullcontext():
            output_NH, bias_EH = self.linear_fc2(inner_NI, counts_E)
        if bias_EH is not None:
            output_NH = WeightedBias.apply(output_NH, bias_EH, weights_N1, on_device(counts_E))
        return output_NH, None


def made_again(tensor: torch.Tensor, make: Callable[[], torch.Tensor]) -> saved_tensors_hooks:
    """Within this context autograd keeps `make` instead of `tensor`, and calls it in the backward pass."""
    storage, shape = tensor.untyped_storage()._cdata, tensor.shape

    def pack(kept: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        is_it = kept.untyped_storage()._cdata == storage and kept.shape == shape
        return make if is_it else kept

    def unpack(kept: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else kept()

    return saved_tensors_hooks(pack, unpack)


def weighted_activation(
    activation: Callable, is_gated: bool, inner_NO: torch.Tensor, weights_N1: torch.Tensor
) -> torch.Tensor:
    """activation(gate) * up * weight, or activation(inner) * weight: [N, O] (gated: gate and up, O = 2 I) and [N, 1] -> [N, I].

    In fp32, and on a CPU as many rows at a time as its cache holds: whole, the fp32 values went through the main memory
    several times and took longer than the products around it.
    """
    if is_one_kernel(activation):
        return activated(inner_NO, weights_N1, activation, is_gated)
    output_NI = inner_NO.new_empty(len(inner_NO), inner_NO.shape[1] // (2 if is_gated else 1))
    for rows in blocks_of(inner_NO):
        output_NI[rows] = active_rows(inner_NO[rows], weights_N1[rows], activation, is_gated)
    return output_NI


class WeightedActivation(torch.autograd.Function):
    """`weighted_activation`, of which only the inputs are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx, inner_NO: torch.Tensor, weights_N1: torch.Tensor, activation: Callable, is_gated: bool
    ) -> torch.Tensor:
        """[N, O] (gated: gate and up, O = 2 I) and weights [N, 1] -> [N, I]."""
        ctx.activation, ctx.is_gated = activation, is_gated
        ctx.save_for_backward(inner_NO, weights_N1)
        return weighted_activation(activation, is_gated, inner_NO, weights_N1)

    @staticmethod
    def backward(ctx, grad_NI: torch.Tensor):
        """Gradients of the inner products [N, O] and of the weights [N, 1]."""
        inner_NO, weights_N1 = ctx.saved_tensors
        how = ctx.activation, ctx.is_gated
        if is_one_kernel(ctx.activation):
            return *activated_gradients(inner_NO, weights_N1, grad_NI, *how), None, None
        grad_inner_NO, grad_weights_N1 = torch.empty_like(inner_NO), torch.empty_like(weights_N1)
        for rows in blocks_of(inner_NO):
            parts, grad_weights_N1[rows] = gradients_of_rows(inner_NO[rows], weights_N1[rows], grad_NI[rows], *how)
            for place, part in zip(grad_inner_NO[rows].chunk(len(parts), dim=1), parts, strict=True):
                place.copy_(part)
        return grad_inner_NO, grad_weights_N1, None, None


def active_rows(inner_NO: torch.Tensor, weights_N1: torch.Tensor, activation: Callable, is_gated: bool) -> torch.Tensor:
    """[N, I] in fp32: activation(gate) * up * weight, or activation(inner) * weight."""
    gate_NI, *up_NI = inner_NO.float().chunk(2 if is_gated else 1, dim=1)
    active_NI = activation(gate_NI)
    for up in up_NI:
        active_NI.mul_(up)
    return active_NI.mul_(weights_N1)


def gradients_of_rows(
    inner_NO: torch.Tensor, weights_N1: torch.Tensor, grad_NI: torch.Tensor, activation: Callable, is_gated: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """In fp32: the gradients of gate and up, or of inner, [N, I] each, and of the weights [N, 1]."""
    gate_NI, *up_NI = inner_NO.float().chunk(2 if is_gated else 1, dim=1)
    grad = grad_NI.float()
    active_NI = activation(gate_NI)
    product_NI = active_NI * up_NI[0] if is_gated else active_NI
    grad_weights_N1 = (product_NI * grad).sum(dim=1, keepdim=True)
    grad = grad * weights_N1
    if not is_gated:
        return [activation_gradient(activation, gate_NI, grad)], grad_weights_N1
    return [activation_gradient(activation, gate_NI, grad * up_NI[0]), active_NI.mul_(grad)], grad_weights_N1


@fusible
def activated(inner_NO: torch.Tensor, weights_N1: torch.Tensor, activation: Callable, is_gated: bool) -> torch.Tensor:
    """`active_rows` in the type of `inner_NO`."""
    return active_rows(inner_NO, weights_N1, activation, is_gated).to(inner_NO.dtype)


@fusible
def activated_gradients(
    inner_NO: torch.Tensor, weights_N1: torch.Tensor, grad_NI: torch.Tensor, activation: Callable, is_gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gradients_of_rows` as one tensor [N, O], and of the weights, in the types of `inner_NO` and `weights_N1`."""
    parts, grad_weights_N1 = gradients_of_rows(inner_NO, weights_N1, grad_NI, activation, is_gated)
    return torch.cat([part.to(inner_NO.dtype) for part in parts], dim=1), grad_weights_N1.to(weights_N1.dtype)


class WeightedBias(torch.autograd.Function):
    """output + bias of the row's expert * weight: [N, H], [E, H], [N, 1] and counts [E] -> [N, H].

    In fp32; what autograd would keep, the biases of all rows, is made anew in the backward pass.
    """

    @staticmethod
    def forward(ctx, output_NH: torch.Tensor, bias_EH: torch.Tensor, weights_N1: torch.Tensor, counts_E: torch.Tensor):
        """[N, H], in the type of `output_NH`."""
        ctx.save_for_backward(bias_EH, weights_N1, counts_E)
        return (output_NH + for_each_row(bias_EH, counts_E, len(output_NH)) * weights_N1).to(output_NH.dtype)

    @staticmethod
    def backward(ctx, grad_NH: torch.Tensor):
        """Gradients of the output, the biases and the weights."""
        bias_EH, weights_N1, counts_E = ctx.saved_tensors
        with torch.enable_grad():
            bias_EH = bias_EH.detach().requires_grad_()
            rows_NH = for_each_row(bias_EH, counts_E, len(grad_NH))
        (grad_bias_EH,) = torch.autograd.grad(rows_NH, bias_EH, grad_NH.float() * weights_N1)
        return grad_NH, grad_bias_EH, torch.linalg.vecdot(grad_NH.float(), rows_NH).unsqueeze(1), None


def activation_gradient(activation: Callable, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """grad * activation'(x)."""
    if activation is F.silu:
        return torch.ops.aten.silu_backward(grad, x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(activation(x), x, grad)[0]


def is_one_kernel(activation: Callable) -> bool:
    """Whether all rows are worked on at once. Other activations than SiLU have autograd find their gradient, which does not
    compile."""
    return compiles() and activation is F.silu


def blocks_of(x_NO: torch.Tensor) -> list[slice]:
    """The rows that are worked on at a time: `BLOCK` entries, at least one row; on a GPU all."""
    size = max(len(x_NO) if platform.HAS_CUDA else BLOCK // x_NO.shape[1], 1)
    return [slice(start, start + size) for start in range(0, len(x_NO), size)]
