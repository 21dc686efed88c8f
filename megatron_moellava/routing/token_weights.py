"""The experts of every token of one forward pass: what a request's record and an analysis keep.

Shapes: T tokens of the pass in Megatron-Core's order, E experts.
"""

from contextlib import AbstractContextManager

import torch

from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routing.observer import RouterCall, RoutingObserver


class TokenWeights:
    """The routers' weights of the last recorded forward pass, on this pipeline stage."""

    def __init__(self, model: MoELlava):
        self.observer = RoutingObserver([model])
        self.layers = list(self.observer.routers)  # from 0
        self.weights_TE: dict[int, torch.Tensor] = {}  # by layer; fp32 on the CPU, 0 where a token is not sent

    def recording(self) -> AbstractContextManager[None]:
        """Context of a forward pass whose weights replace those kept so far."""
        self.weights_TE = {}
        return self.observer.watch(self._keep)

    def _keep(self, call: RouterCall) -> None:
        self.weights_TE[call.layer] = call.weights_NE.float().cpu()
