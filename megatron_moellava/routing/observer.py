"""Watching routers: whoever wants to know what they decide subscribes for a while, and routers know nothing of it.

Training statistics, a request's record and an analysis may watch the same routers at once and stop in any order. Hooks
exist only while somebody watches, so an unwatched model pays nothing, and `is_observed` tells code that computes what a
router would have decided (`inference/fast_decoder.py`) that this time the module itself must be asked.

Shapes: N tokens of this rank in Megatron-Core's order (sequence first), S sequence, B batch, H hidden, E experts.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch.utils.hooks import RemovableHandle

from megatron_moellava.config import Component
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.original_gate import Gate
from megatron_moellava.model.router import MegatronRouter, OriginalRouter
from megatron_moellava.placement import moe_layer_freq

from megatron.core.transformer.moe.moe_layer import MoELayer


class RouterCall:
    """One forward pass of one router. What is not needed is not computed; valid only while the callback runs."""

    def __init__(
        self,
        layer: int,
        router: MegatronRouter,
        hidden_SBH: torch.Tensor,
        weights_NE: torch.Tensor,
        map_NE: torch.Tensor,
        gating: tuple[torch.Tensor, Gate] | None,
        marks: torch.Tensor | None = None,
    ):
        """`layer`: from 0. `gating`: what the gate of the original's router was given and said, whole and batch-major.
        `marks`: what the router was given beside the hidden states."""
        self.layer, self.router, self._hidden_SBH = layer, router, hidden_SBH
        self.weights_NE, self.map_NE, self.gating = weights_NE, map_NE, gating
        self._marks = marks

    @cached_property
    @torch.no_grad()
    def product_NE(self) -> torch.Tensor:
        """The router's own product once more: the same operands give the same bits."""
        return self.router.gating(self._hidden_SBH).flatten(0, 1)

    @cached_property
    @torch.no_grad()
    def logits_NE(self) -> torch.Tensor:
        """What the choice is made of: the product, but -inf where a token may not choose an expert."""
        logits_SBE = self.product_NE.view(*self._hidden_SBH.shape[:2], -1)
        return self.router.judged(logits_SBE, self._marks).flatten(0, 1)

    @cached_property
    def probabilities_NE(self) -> torch.Tensor:
        """Over all experts (fp32), before any choice."""
        return self.router.probabilities(self.logits_NE)

    @property
    def is_real_N(self) -> torch.Tensor:
        """bool: tokens that stand for something, of a router that is told which are padding and no more."""
        if self._marks is None:
            return torch.ones(len(self.map_NE), dtype=torch.bool, device=self.map_NE.device)
        return ~self._marks.flatten()

    @cached_property
    def asked_NE(self) -> torch.Tensor:
        """bool: what the tokens asked for. `map_NE` is what they got; what a full expert dropped is missing there."""
        if self.gating is not None:
            gate = self.gating[1]
            asked_NE = torch.zeros_like(gate.routing_map_NE).scatter(1, gate.choices_NK, True)
            length, batch = self._hidden_SBH.shape[:2]
            return self.router.of_this_rank(asked_NE, length * self.router.sequence_split, batch)
        if self.router.config.moe_expert_capacity_factor is None:
            return self.map_NE
        return torch.zeros_like(self.map_NE).scatter(1, self.router.choices(self.logits_NE), True)


Subscriber = Callable[[RouterCall], None]


class RoutingObserver:
    """The routers of this rank's chunks, by layer from 0: of the language model, or of the tower or the projector."""

    def __init__(self, chunks: Sequence[MoELlava], component: Component = "language"):
        self.routers: dict[int, MegatronRouter] = {
            number: mlp.router
            for chunk in chunks
            for number, mlp in _mlps(chunk, component)
            if isinstance(mlp, MoELayer)
        }

    @contextmanager
    def watch(self, subscriber: Subscriber) -> Iterator[None]:
        """Context in which `subscriber` hears of every call of every router, also of those that a recomputation makes."""
        taps = [_TAPS.setdefault(router, _Tap(layer, router)) for layer, router in self.routers.items()]
        for tap in taps:
            tap.add(subscriber)
        try:
            yield
        finally:
            for tap in taps:
                tap.remove(subscriber)


def _mlps(chunk: MoELlava, component: Component) -> list[tuple[int, torch.nn.Module]]:
    """(layer from 0, what may be its experts) of what this rank holds of a part of the model."""
    if component == "language":
        return [(layer.layer_number - 1, layer.mlp) for layer in chunk.language_model.decoder.layers]
    if not chunk.pre_process:
        return []
    if component == "projector":
        return [(0, chunk.projector)]
    return [(layer.layer_number - 1, layer.mlp) for layer in chunk.vision_tower.decoder.layers]


def layer_freq(chunk: MoELlava, component: Component) -> list[int]:
    """Of each layer of a part of the whole model: 1 with experts, 0 without; on ranks that hold none of it, too."""
    sizes = {"language": chunk.backbone.num_layers, "tower": chunk.tower.num_used_layers, "projector": 1}
    return moe_layer_freq(chunk.run.mixtures[component].placement, sizes[component])


def is_observed(router: MegatronRouter) -> bool:
    """Whether anybody watches this router now."""
    return router in _TAPS and bool(_TAPS[router].subscribers)


class _Tap:
    """The hooks of one router, there while it has subscribers."""

    def __init__(self, layer: int, router: MegatronRouter):
        self.layer, self.router = layer, weakref.ref(router)
        self.subscribers: list[Subscriber] = []
        self.hooks: list[RemovableHandle] = []
        self.gating: tuple[torch.Tensor, Gate] | None = None  # of the call that is under way

    def add(self, subscriber: Subscriber) -> None:
        if not self.subscribers:
            router = self.router()
            assert router is not None, "the model is gone"
            self.hooks = [router.register_forward_hook(self._after_router)]
            if isinstance(router, OriginalRouter):
                self.hooks.append(router.gate.register_forward_hook(self._after_gate))
        self.subscribers.append(subscriber)

    def remove(self, subscriber: Subscriber) -> None:
        self.subscribers.remove(subscriber)
        if not self.subscribers:
            for hook in self.hooks:
                hook.remove()

    def _after_gate(self, gate, inputs, output: Gate) -> None:
        self.gating = inputs[0].detach(), output

    def _after_router(self, router: MegatronRouter, inputs, output) -> None:
        gating, self.gating = self.gating, None
        call = RouterCall(self.layer, router, inputs[0].detach(), output[0].detach(), output[1], gating, *inputs[1:])
        for subscriber in tuple(self.subscribers):
            subscriber(call)


_TAPS: weakref.WeakKeyDictionary[MegatronRouter, _Tap] = weakref.WeakKeyDictionary()
