"""The products of grouped experts: rows sorted by expert, one weight per expert, three products each (output, gradients).

On a GPU torch's grouped_mm, whose host must not wait for the counts. On a CPU one product per expert, which is what
grouped_mm comes to there, but from the experts' own weights and into its place in the result: nothing is stacked.
Shapes: N rows sorted by expert, E local experts, I input and O output features of this shard.
"""

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
        """Bit by bit grouped_mm of the stacked weights. `counts`: rows of each expert; they add up to N."""
        ctx.counts = counts
        ctx.save_for_backward(input_NI if any(ctx.needs_input_grad[2:]) else None, *weights_OI)
        output_NO = input_NI.new_empty(len(input_NI), len(weights_OI[0]))
        for rows, weight, output in zip(input_NI.split(counts), weights_OI, output_NO.split(counts), strict=True):
            torch.mm(rows, weight.t(), out=output)
        return output_NO

    @staticmethod
    def backward(ctx, *grads_NO: torch.Tensor) -> tuple:
        """Gradients of the input and of each weight, as far as they are wanted."""
        input_NI, *weights_OI = ctx.saved_tensors
        needs_input, _, *needs_weights = ctx.needs_input_grad
        grads_E = grads_NO[0].split(ctx.counts)
        grad_NI = None
        if needs_input:
            grad_NI = grads_NO[0].new_empty(len(grads_NO[0]), weights_OI[0].shape[1])
            for grad, weight, place in zip(grads_E, weights_OI, grad_NI.split(ctx.counts), strict=True):
                torch.mm(grad, weight, out=place)
        if input_NI is None:
            return grad_NI, *(None,) * (1 + len(weights_OI))
        rows_E = input_NI.split(ctx.counts)
        wanted = zip(grads_E, rows_E, needs_weights, strict=True)
        return grad_NI, None, *(grad.t() @ rows if is_needed else None for grad, rows, is_needed in wanted)


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
