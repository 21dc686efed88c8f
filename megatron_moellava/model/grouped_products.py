"""The products of grouped experts: rows sorted by expert, one weight per expert, three products each (output, gradients).

On a GPU torch's grouped_mm, whose host must not wait for the counts. On a CPU one product per expert, which is what
grouped_mm comes to there, but from the experts' own weights and into its place in the result: nothing is stacked. And of
numbers of rows that come again, since each new one is compiled.
Shapes: N rows sorted by expert, E local experts, I input and O output features of this shard.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import megatron_moellava.platform as platform

Counts = torch.Tensor | list[int]  # [E], rows of each expert


def counts_of(tokens_per_expert: Any) -> Counts:
    """What a dispatcher says (tensor, array or list) as these products want it: plain numbers, on a GPU a tensor."""
    if platform.HAS_CUDA:
        return torch.as_tensor(tokens_per_expert)
    return tokens_per_expert if isinstance(tokens_per_expert, list) else tokens_per_expert.tolist()


def on_device(counts_E: Counts) -> torch.Tensor:
    """[E] on the device; nothing waits for them."""
    return platform.on_device(torch.as_tensor(counts_E))


def offsets(counts_E: Counts) -> torch.Tensor:
    """[E] int32 on the device, where each expert's rows end."""
    return on_device(counts_E).cumsum(0, dtype=torch.int32)


def for_each_row(values_E: torch.Tensor, counts_E: Counts, rows: int) -> torch.Tensor:
    """[E, ...] -> [N, ...] in fp32, in which the gradient adds up: to each row what belongs to its expert."""
    return values_E.float().repeat_interleave(on_device(counts_E), dim=0, output_size=rows)


def grouped_product(input_NI: torch.Tensor, weight_EOI: torch.Tensor, counts_E: Counts) -> torch.Tensor:
    """[N, I] sorted by expert x [E, O, I] -> [N, O]."""
    return F.grouped_mm(input_NI, weight_EOI.transpose(1, 2), offs=offsets(counts_E))


def product_of_separate(input_NI: torch.Tensor, weights_OI: list[torch.Tensor], counts_E: Counts) -> torch.Tensor:
    """[N, I] sorted by expert x E weights [O, I] -> [N, O], without a stacked copy that lives until the backward pass."""
    if platform.HAS_CUDA:
        return StackedProduct.apply(input_NI, offsets(counts_E), *weights_OI)
    return ProductByExpert.apply(input_NI, counts_of(counts_E), *weights_OI)


class ProductByExpert(torch.autograd.Function):
    """[N, I] x E weights [O, I] -> [N, O], expert by expert."""

    @staticmethod
    def forward(ctx, input_NI: torch.Tensor, counts: list[int], *weights_OI: torch.Tensor) -> torch.Tensor:
        """What grouped_mm of the stacked weights gives. `counts`: rows of each expert; they add up to N."""
        ctx.blocks = expert_blocks(counts, input_NI.dtype)
        ctx.save_for_backward(input_NI if any(ctx.needs_input_grad[2:]) else None, *weights_OI)
        return multiplied(input_NI, [weight.t() for weight in weights_OI], ctx.blocks)

    @staticmethod
    def backward(ctx, *grads_NO: torch.Tensor) -> tuple:
        """Gradients of the input and of each weight, as far as they are wanted."""
        input_NI, *weights_OI = ctx.saved_tensors
        needs_input, _, *needs_weights = ctx.needs_input_grad
        grad_NI = multiplied(grads_NO[0], weights_OI, ctx.blocks) if needs_input else None
        if input_NI is None:
            return grad_NI, *(None,) * (1 + len(weights_OI))
        wanted = zip(ctx.blocks, needs_weights, strict=True)
        return (
            grad_NI,
            None,
            *(block.product(grads_NO[0], input_NI) if is_needed else None for block, is_needed in wanted),
        )


ROUNDED_UP_TO = 16  # rows: as many as an AMX tile has


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows of one expert, and `wide`, which has some of its neighbours' besides.

    oneDNN, which multiplies 16-bit numbers on a CPU, compiles a kernel for every number of rows that it meets. Those of an
    expert change from step to step, and for a small model compiling took longer than all products. Of numbers rounded up there
    are few.
    """

    own: slice
    wide: slice

    @property
    def within(self) -> slice:
        """Where the own rows are in the wide ones."""
        return slice(self.own.start - self.wide.start, self.own.stop - self.wide.start)

    def product(self, first_NO: torch.Tensor, second_NI: torch.Tensor) -> torch.Tensor:
        """[O, I], the sum over the own rows of first x second."""
        if self.own == self.wide:
            return first_NO[self.own].t() @ second_NI[self.own]
        first, second = first_NO[self.wide], second_NI[self.wide]
        if first.shape[1] < second.shape[1]:  # the smaller one is copied, with zeros for the neighbours
            return self._alone(first).t() @ second
        return first.t() @ self._alone(second)

    def _alone(self, wide: torch.Tensor) -> torch.Tensor:
        alone = torch.zeros_like(wide)
        alone[self.within] = wide[self.within]
        return alone


def expert_blocks(counts: list[int], dtype: torch.dtype) -> list[RowBlock]:
    """Of experts that have so many rows each, one after the other."""
    blocks, total, start = [], sum(counts), 0
    for count in counts:
        own = slice(start, start + count)
        rounded = -(-count // ROUNDED_UP_TO) * ROUNDED_UP_TO if dtype != torch.float32 else count
        first = min(start, total - rounded)
        blocks.append(RowBlock(own, slice(first, first + rounded) if first >= 0 else own))
        start = own.stop
    return blocks


def multiplied(input_NI: torch.Tensor, matrices_IO: list[torch.Tensor], blocks: list[RowBlock]) -> torch.Tensor:
    """[N, I] x a matrix [I, O] for each block of rows -> [N, O]."""
    output_NO = input_NI.new_empty(len(input_NI), matrices_IO[0].shape[1])
    for block, matrix_IO in zip(blocks, matrices_IO, strict=True):
        if block.own.start == block.wide.start:  # what is too much lies where the next expert's result comes
            torch.mm(input_NI[block.wide], matrix_IO, out=output_NO[block.wide])
        else:
            output_NO[block.own] = (input_NI[block.wide] @ matrix_IO)[block.within]
    return output_NO


class StackedProduct(torch.autograd.Function):
    """[N, I] x E weights [O, I] -> [N, O], by grouped_mm.

    The weights are stacked when they are needed and kept as they are: torch would keep the stacked copy until the backward
    pass, of every MoE layer at once (of Phi-2, 6.7 GB).
    """

    @staticmethod
    def forward(ctx, input_NI: torch.Tensor, offsets_E: torch.Tensor, *weights_OI: torch.Tensor) -> torch.Tensor:
        """The same as grouped_mm of the stacked weights."""
        kept_NI = input_NI if any(ctx.needs_input_grad[2:]) else None
        ctx.save_for_backward(kept_NI, offsets_E, *weights_OI)
        return F.grouped_mm(input_NI, torch.stack(weights_OI).transpose(1, 2), offs=offsets_E)

    @staticmethod
    def backward(ctx, *grads_NO: torch.Tensor) -> tuple:
        """Gradients of the input and of each weight, as far as they are wanted."""
        (grad_NO,) = grads_NO
        input_NI, offsets_E, *weights_OI = ctx.saved_tensors
        grad_NI = None
        grads_OI: tuple = (None,) * len(weights_OI)
        if ctx.needs_input_grad[0]:
            grad_NI = F.grouped_mm(grad_NO, torch.stack(weights_OI), offs=offsets_E)
        if input_NI is not None:
            grads_OI = F.grouped_mm(grad_NO.t(), input_NI, offs=offsets_E).unbind()
        return grad_NI, None, *grads_OI
