"""The largest activation and the largest gradient of every decoder layer: where 16 bits end first.

fp16 ends at 65,504 and bf16 keeps 8 bits, so what grows from layer to layer tells where numbers overflow or small ones vanish
beside large ones. Watched are what each layer adds to the residual stream (`attention`, `mlp`), the stream after it (`hidden`),
each with the gradient of the step's loss, and the routers' logits. Hooks exist only during the steps that are recorded.

Gradients are those of the loss of the whole batch, whatever the layout and the loss scale: in fp16 the backward pass holds them
multiplied by the loss scale, which the record gives.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routing.observer import RouterCall, RoutingObserver

POINTS = ("attention", "mlp", "hidden", "attention_gradient", "mlp_gradient", "hidden_gradient", "router_logits")
GRADIENTS = tuple(point.endswith("gradient") for point in POINTS)


class MaxActivations:
    """Maxima of one rank, and of all ranks when they are collected."""

    def __init__(self, chunks: Sequence[MoELlava]):
        self.layers = [layer for chunk in chunks for layer in chunk.language_model.decoder.layers]
        self.observer = RoutingObserver(chunks)
        self.num_layers = chunks[0].config.num_layers
        self._forget()

    def _forget(self) -> None:
        self.maxima_PL = torch.full((len(POINTS), self.num_layers), -1.0, device=platform.device())  # -1: not seen

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context of a step's forward and backward passes."""
        hooks = []
        for layer in self.layers:
            number = layer.layer_number - 1
            for point, module in (("attention", layer.self_attention), ("mlp", layer.mlp), ("hidden", layer)):
                hooks.append(module.register_forward_hook(partial(self._after, point, number)))
        try:
            with self.observer.watch(self._router):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after(self, point: str, layer: int, module, inputs, output) -> None:
        activation = output[0] if isinstance(output, tuple) else output
        self._note(point, layer, activation.detach())
        if activation.requires_grad:
            activation.register_hook(partial(self._note, f"{point}_gradient", layer))

    def _router(self, call: RouterCall) -> None:
        self._note("router_logits", call.layer, call.product_NE)

    def _note(self, point: str, layer: int, values: torch.Tensor) -> None:
        if values.numel():
            here = self.maxima_PL[POINTS.index(point), layer]
            # A maximum over ranks must not depend on how a library orders what is no number.
            here.copy_(torch.maximum(here, values.abs().max().float().nan_to_num(nan=math.inf, posinf=math.inf)))

    def collect(self, loss_scale: float) -> list[dict]:
        """For each decoder layer {"layer": number from 0, point: maximum over all ranks}; collective. Starts anew."""
        dist.all_reduce(self.maxima_PL, op=dist.ReduceOp.MAX)
        # A rank's loss counts as often as there are ranks that share the batch; their gradients are averaged afterwards.
        divisor = loss_scale * parallel.data_parallel_size() * parallel.context_parallel_size()
        rows = []
        for layer, column in enumerate(self.maxima_PL.t().tolist()):
            points = zip(POINTS, GRADIENTS, column, strict=True)
            found = {
                point: significant(value / divisor if is_gradient else value)
                for point, is_gradient, value in points
                if value >= 0
            }
            rows.append({"layer": layer, **found})
        self._forget()
        return rows


def significant(value: float) -> float:
    """Six digits, however small."""
    return float(f"{value:.6g}")


def scalars(rows: list[dict]) -> dict[str, float]:
    """TensorBoard's names: `activations/hidden_gradient/layer3`."""
    return {
        f"activations/{point}/layer{row['layer']}": value
        for row in rows
        for point, value in row.items()
        if point != "layer"
    }
