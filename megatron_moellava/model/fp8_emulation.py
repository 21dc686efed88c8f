"""FP8 on a machine without FP8 units: every product of the decoder's linear layers quantises as its recipe says.

Transformer Engine does this on a GPU. Here the same modules (attention, FFN, experts, shared experts) keep their weights,
their collectives and their checkpoints; only their product is replaced by one whose three operands - input, weight and
output gradient - are rounded to FP8 with the recipe's scaling and back. Router, embeddings, norms, output layer,
projector and tower stay in high precision, as do the first and last layers that the run names.

A linear layer is a grouped one with a single expert. Every expert has scales of its own, and its rows are padded with
zeros to the multiple that FP8 products need. Shapes: N rows sorted by expert, E experts, I input and O output features.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from megatron_moellava.model.configuration import FP8_RECIPES, Fp8Recipe
from megatron_moellava.model.experts import GroupedLinear
from megatron_moellava.model.grouped_products import Counts

from megatron.core import parallel_state
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

KINDS = ("input", "weight", "gradient")


def element_type(recipe: Fp8Recipe, kind: str) -> torch.dtype:
    """E4M3 has the finer steps, E5M2 the wider range, which gradients under one scale need."""
    wide = recipe.format == "hybrid" and kind == "gradient"
    return torch.float8_e5m2 if wide else torch.float8_e4m3fn


def block_shape(recipe: Fp8Recipe, kind: str, axis: int) -> tuple[int, int] | None:
    """Entries that share a scale, for a product that sums over `axis` of the operand; None: all of them."""
    if recipe.block is None:
        return None
    if kind == "weight" and recipe.square_weights:
        return recipe.block, recipe.block
    return (recipe.block, 1) if axis == 0 else (1, recipe.block)


def scale_of(amax: torch.Tensor, dtype: torch.dtype, power_of_two: bool) -> torch.Tensor:
    """What brings the largest entry to the largest FP8 number; a power of two is rounded down, so that nothing overflows.

    amax 3.5, E4M3 (largest 448): 128. amax 3: 149.33, or 128 as a power of two. amax 0: 1.
    """
    scale = torch.finfo(dtype).max / amax.float()
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return torch.where((amax > 0) & scale.isfinite(), scale, torch.ones_like(scale))


def to_fp8(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The FP8 numbers of x * scale; what is too large becomes the largest, but what is not finite must be seen as such."""
    limit = torch.finfo(dtype).max
    x = x.float()
    return (x * scale).clamp(-limit, limit).masked_fill(~x.isfinite(), float("nan")).to(dtype)


def rounded(x: torch.Tensor, amax: torch.Tensor, dtype: torch.dtype, power_of_two: bool) -> torch.Tensor:
    """x through FP8 and back, in its own dtype. `amax` broadcasts against x."""
    scale = scale_of(amax, dtype, power_of_two)
    return (to_fp8(x, scale, dtype).float() / scale).to(x.dtype)


def blocks(x_RC: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """[R, C] -> [R / r, r, C / c, c], filled up with zeros. A block is what is left after fixing axes 0 and 2."""
    rows, columns = x_RC.shape
    padded = F.pad(x_RC, (0, -columns % shape[1], 0, -rows % shape[0]))
    return padded.view(-1, shape[0], padded.shape[1] // shape[1], shape[1])


class Scaling:
    """The scales of one module's products: the amax history of the delayed recipe, nothing for the others."""

    def __init__(self, recipe: Fp8Recipe, num_experts: int, is_trained: bool = True):
        """A frozen module keeps the history that it has, like everything else of it."""
        self.recipe, self.is_trained = recipe, is_trained
        self.seen_KE = torch.zeros(len(KINDS), num_experts)  # largest magnitudes since the last `advance`
        self.history_TKE = torch.zeros(recipe.history, len(KINDS), num_experts)

    def advance(self, seen_KE: torch.Tensor) -> None:
        """Push the amaxes of one optimizer step; the oldest falls out."""
        if self.is_trained:
            self.history_TKE = torch.cat([seen_KE[None], self.history_TKE[:-1]])
        self.forget()

    def forget(self) -> None:
        """As if nothing had been seen since the last `advance`."""
        self.seen_KE = torch.zeros_like(self.seen_KE)

    def round(self, x_RC: torch.Tensor, kind: str, axis: int, expert: int = 0) -> torch.Tensor:
        """One operand through FP8 and back; `axis` is the one that the product sums over."""
        if not x_RC.numel():
            return x_RC
        recipe, dtype = self.recipe, element_type(self.recipe, kind)
        shape = block_shape(recipe, kind, axis)
        if shape is not None:
            tiles = blocks(x_RC, shape)
            result = rounded(tiles, tiles.abs().amax((1, 3), keepdim=True), dtype, recipe.power_of_two)
            return result.view(result.shape[0] * shape[0], -1)[: x_RC.shape[0], : x_RC.shape[1]]
        amax = x_RC.abs().max().float()
        if recipe.history:
            amax = self._delayed(amax, KINDS.index(kind), expert)
        return rounded(x_RC, amax, dtype, recipe.power_of_two)

    def _delayed(self, amax: torch.Tensor, kind: int, expert: int) -> torch.Tensor:
        """The largest of the history. Before there is one, the operand's own: a scale of 1 would round gradients to zero."""
        self.seen_KE[kind, expert] = torch.maximum(self.seen_KE[kind, expert], amax.detach().cpu())
        past = self.history_TKE[:, kind, expert].max().to(amax)
        return torch.where(past > 0, past, amax)


class Product(torch.autograd.Function):
    """[N, I] x [E, O, I] -> [N, O], three products of rounded operands: output, input gradient, weight gradient."""

    @staticmethod
    def forward(ctx, input_NI, weight_EOI, offsets: tuple[int, ...], scaling: Scaling):
        """[N, I] x [E, O, I] -> [N, O]; `offsets`: where the rows of each expert begin, and their end."""
        ctx.save_for_backward(input_NI, weight_EOI)
        ctx.offsets, ctx.scaling = offsets, scaling
        rows_NI = _round_rows(scaling, input_NI, "input", 1, offsets)
        return _grouped(rows_NI, _round_weights(scaling, weight_EOI, 1).transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx, gradient_NO):
        """Gradients [N, I] and [E, O, I] from [N, O]."""
        input_NI, weight_EOI = ctx.saved_tensors
        offsets, scaling = ctx.offsets, ctx.scaling
        to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            rows_NO = _round_rows(scaling, gradient_NO, "gradient", 1, offsets)
            to_input = _grouped(rows_NO, _round_weights(scaling, weight_EOI, 0), offsets)
        if ctx.needs_input_grad[1]:
            columns_NO = _round_rows(scaling, gradient_NO, "gradient", 0, offsets)
            columns_NI = _round_rows(scaling, input_NI, "input", 0, offsets)
            parts = (columns_NO[a:b].t() @ columns_NI[a:b] for a, b in pairwise(offsets))
            to_weight = torch.stack(list(parts))
        return to_input, to_weight, None, None


def _round_rows(scaling: Scaling, x_NC: torch.Tensor, kind: str, axis: int, offsets: tuple[int, ...]) -> torch.Tensor:
    parts = (scaling.round(x_NC[a:b], kind, axis, expert) for expert, (a, b) in enumerate(pairwise(offsets)))
    return torch.cat(list(parts))


def _round_weights(scaling: Scaling, weight_EOI: torch.Tensor, axis: int) -> torch.Tensor:
    """`axis` 1: the sum runs over inputs; 0: over outputs."""
    return torch.stack([scaling.round(weight, "weight", axis, expert) for expert, weight in enumerate(weight_EOI)])


def _grouped(rows_NC: torch.Tensor, weight_ECD: torch.Tensor, offsets: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([rows_NC[a:b] @ weight for (a, b), weight in zip(pairwise(offsets), weight_ECD, strict=True)])


def padded_offsets(tokens_per_expert: list[int], multiple: int) -> tuple[int, ...]:
    """Where each expert's rows begin once every expert has a multiple: [3, 0, 16], 16 -> (0, 16, 16, 32)."""
    offsets = [0]
    for count in tokens_per_expert:
        offsets.append(offsets[-1] + -(-count // multiple) * multiple)
    return tuple(offsets)


def experts_product(scaling: Scaling, module: GroupedLinear, input_NI: torch.Tensor, counts_E: Counts) -> torch.Tensor:
    """The product of `GroupedLinear`."""
    return grouped_product(scaling, input_NI, module.stacked("weight"), counts_E)


def grouped_product(scaling: Scaling, input_NI: torch.Tensor, weight_EOI, counts_E: Counts) -> torch.Tensor:
    """[N, I] sorted by expert x [E, O, I] -> [N, O], over rows that are padded per expert."""
    tokens_per_expert = counts_E if isinstance(counts_E, list) else counts_E.tolist()
    offsets = padded_offsets(tokens_per_expert, scaling.recipe.multiple)
    if offsets[-1] == len(input_NI):
        return Product.apply(input_NI, weight_EOI, offsets, scaling)
    places = [torch.arange(first, first + n) for first, n in zip(offsets, tokens_per_expert, strict=False)]
    places_N = torch.cat(places).to(input_NI.device)
    padded = input_NI.new_zeros(offsets[-1], input_NI.shape[1]).index_copy(0, places_N, input_NI)
    return Product.apply(padded, weight_EOI, offsets, scaling)[places_N]


def linear_product(
    scaling: Scaling, input, weight, bias=None, *, allreduce_dgrad, sequence_parallel, tp_group=None, **_
) -> torch.Tensor:
    """The product of Megatron-Core's linear layers, with the collectives that their own has inside."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    rows_NI = input.flatten(0, -2)
    output = grouped_product(scaling, rows_NI, weight[None], [len(rows_NI)]).view(*input.shape[:-1], weight.shape[0])
    return output if bias is None else output + bias


@dataclass(slots=True)
class Emulation:
    """The scalings of all modules of this rank, in the order of the model."""

    recipe: Fp8Recipe
    scalings: list[Scaling]

    def advance(self) -> None:
        """After an optimizer step: the ranks of a stage agree on amaxes, and the delayed recipe's histories move on.

        Transformer Engine moves after each micro-batch. Once per step, recomputed layers round as they did before,
        and the order of micro-batches does not matter.
        """
        if not self.recipe.history or not self.scalings:
            return
        seen = torch.cat([scaling.seen_KE.flatten() for scaling in self.scalings])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX, group=group)
        parts = seen.split([scaling.seen_KE.numel() for scaling in self.scalings])
        for scaling, part in zip(self.scalings, parts, strict=True):
            scaling.advance(part.view_as(scaling.seen_KE))

    def keep(self) -> None:
        """Before a step: nothing is to be kept, since only `advance` moves the histories."""

    def forget(self) -> None:
        """After a step that was skipped: what it saw, perhaps infinities, must not reach the histories."""
        for scaling in self.scalings:
            scaling.forget()

    def state(self) -> list[torch.Tensor]:
        """The histories, for a checkpoint of this rank."""
        return [scaling.history_TKE for scaling in self._remembering()]

    def load_state(self, state: list[torch.Tensor]) -> None:
        """Take over the histories of a checkpoint; the inverse of `state`. Transformer Engine's say nothing here."""
        if [item.shape for item in state] != [item.shape for item in self.state()]:
            return
        for scaling, history_TKE in zip(self._remembering(), state, strict=True):
            scaling.history_TKE = history_TKE

    def _remembering(self) -> list[Scaling]:
        """Those with a history: of a recipe that scales by what it sees now, none."""
        return self.scalings if self.recipe.history else []


def emulate_fp8(chunks: list, recipe: str, config: TransformerConfig) -> Emulation:
    """Replace the products of the decoder layers that the run keeps in FP8."""
    emulation = Emulation(FP8_RECIPES[recipe], [])
    for chunk in chunks:
        for layer in chunk.language_model.decoder.layers:
            if not is_first_last_bf16_layer(config, layer.layer_number - 1):
                for module in layer.modules():
                    _replace_product(module, emulation)
    return emulation


def _replace_product(module: torch.nn.Module, emulation: Emulation) -> None:
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    if isinstance(module, GroupedLinear):
        emulation.scalings.append(scaling := Scaling(emulation.recipe, module.num_experts, is_trained))
        module.product = partial(experts_product, scaling, module)  # type: ignore[method-assign]
    elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
        emulation.scalings.append(scaling := Scaling(emulation.recipe, 1, is_trained))
        module._forward_impl = partial(linear_product, scaling)
