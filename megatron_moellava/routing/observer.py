"""What the routers of a training step do, counted exactly under any layout.

Routers are watched by hooks during a model's forward pass only, so that recomputed layers are not counted twice. Every
token is counted by the one rank that routes it; `collect` adds up all ranks. Counting happens on the device, one small
product per layer and micro-batch, and nothing waits for it before `collect`.

Shapes: N tokens, E experts, G groups of tokens (`token_groups.py`), L decoder layers, C columns.
"""

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.data.batch import Batch
from megatron_moellava.model.context_parallel import share
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routing.records import PER_EXPERT, PER_TOKEN, RoutingSums
from megatron_moellava.routing.token_groups import MODALITIES, token_groups

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer


class RoutingObserver:
    """Watches the routers of this rank's layers."""

    def __init__(self, chunks: list[MoELlava]):
        self.config = chunks[0].config
        layers = [
            layer
            for chunk in chunks
            for layer in chunk.language_model.decoder.layers
            if isinstance(layer.mlp, MoELayer)
        ]
        self.routers = [layer.mlp.router for layer in layers]
        self.sums: dict[str, torch.Tensor] = {}  # group -> [L, C]
        self.names: list[str] = []
        self.members_GN: torch.Tensor | None = None
        for layer in layers:
            layer.mlp.router.register_forward_hook(self._count(layer.layer_number - 1))

    @property
    def width(self) -> int:
        return len(PER_EXPERT) * self.config.num_moe_experts + len(PER_TOKEN)

    def observe(self, batch: Batch):
        """Context in which the routers are counted."""
        self.names, members_GBS = token_groups(batch)
        members_GBS = share(members_GBS, dim=2)
        if self.config.sequence_parallel:
            size, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            members_GBS = members_GBS.chunk(size, dim=2)[rank]
        self.members_GN = members_GBS.transpose(1, 2).flatten(1).double()
        return self

    def __enter__(self):
        self._watch(True)
        return self

    def __exit__(self, *exception):
        self._watch(False)
        self.members_GN = None

    def _watch(self, on: bool) -> None:
        for router in self.routers:
            router.watched = on

    def _count(self, layer: int):
        @torch.no_grad()
        def hook(router, inputs, output):
            if self.members_GN is None:
                return
            _, map_NE = output
            sums_GC = self.members_GN @ token_table(router, map_NE)
            for name, sums_C in zip(self.names, sums_GC, strict=True):
                if name not in self.sums:
                    self.sums[name] = sums_C.new_zeros(self.config.num_layers, self.width)
                self.sums[name][layer] += sums_C

        return hook

    def collect(self) -> RoutingSums:
        """The sums of all ranks since the last call. Collective."""
        names = [*MODALITIES, *self._all_types()]
        empty = torch.zeros(self.config.num_layers, self.width, dtype=torch.float64, device=platform.device())
        total_GLC = torch.stack([self.sums.get(name, empty) for name in names])
        if not self.config.sequence_parallel and parallel_state.get_tensor_model_parallel_rank() > 0:
            total_GLC.zero_()  # without sequence parallelism every tensor-parallel rank saw the same tokens
        dist.all_reduce(total_GLC)
        self.sums.clear()
        return RoutingSums(
            groups=tuple(names),
            layers=tuple(layer for layer, is_moe in enumerate(self.config.moe_layer_freq) if is_moe),
            num_experts=self.config.num_moe_experts,
            topk=self.config.moe_router_topk,
            sums_GLC=total_GLC.cpu(),
        )

    def _all_types(self) -> list[str]:
        """Every rank's question types: a rank may not have met one."""
        everywhere: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, [name for name in self.sums if name not in MODALITIES])
        return sorted({name for names in everywhere for name in names})


def token_table(router, map_NE: torch.Tensor) -> torch.Tensor:
    """[N, C] in float64: what one token adds to each column."""
    probabilities_NE = router.probabilities()
    best_NK = probabilities_NE.topk(min(2, probabilities_NE.shape[1]), dim=-1).values
    columns = [map_NE, router.asked(map_NE), probabilities_NE, torch.ones_like(best_NK[:, :1])]
    columns += [-torch.xlogy(probabilities_NE, probabilities_NE).sum(dim=-1, keepdim=True), best_NK]
    if best_NK.shape[1] == 1:
        columns.append(torch.zeros_like(best_NK))
    return torch.cat([column.double() for column in columns], dim=-1)
