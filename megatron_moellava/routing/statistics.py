"""What the routers of a training step do, counted exactly under any layout.

Routers are watched during a model's forward pass only, so that recomputed layers are not counted twice. Every
token is counted by the one rank that routes it; `collect` adds up all ranks. Counting happens on the device, one small
product per layer and micro-batch, and nothing waits for it before `collect`.

Shapes: N tokens, E experts, G groups of tokens (`token_groups.py`), L decoder layers, C columns.
"""

from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.config import Component, MoEConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.model.context_parallel import sequence_share, share
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.routers import admissible_experts
from megatron_moellava.routing.observer import RouterCall, RoutingObserver, layer_freq
from megatron_moellava.routing.records import PER_EXPERT, PER_TOKEN, RoutingSums
from megatron_moellava.routing.token_groups import modalities_of, token_groups

from megatron.core import parallel_state

NO_EXPERTS = MoEConfig(num_moe_experts=1, moe_router_topk=1)  # of a dense model, where nothing is ever counted


class RoutingStatistics:
    """Counts what the routers of this rank's layers do, in one part of the model.

    Of the tower and the projector all tokens are visual ones, of one group; there a layer is one of the tower's.
    """

    def __init__(self, chunks: list[MoELlava], component: Component = "language"):
        run = chunks[0].run
        self.config, self.observer, self.component = chunks[0].config, RoutingObserver(chunks, component), component
        self.moe = run.mixtures.get(component, NO_EXPERTS)
        self.layer_freq = layer_freq(chunks[0], component) if component in run.mixtures else []
        self.modalities = modalities_of(run) if component == "language" else ("image",)
        self.sums: dict[str, torch.Tensor] = {}  # group -> [L, C]
        self.admissible = _admissible(self.moe, self.modalities) if self.moe.expert_groups else None

    @property
    def width(self) -> int:
        """Columns of a layer's row."""
        return len(PER_EXPERT) * self.moe.num_moe_experts + len(PER_TOKEN)

    def count(self, batch: Batch) -> AbstractContextManager[None]:
        """Context of the forward pass of this batch."""
        if self.component != "language":
            return self.observer.watch(lambda call: self._add(["image"], call.is_real_N[None].double(), call))
        names, members_GBS = token_groups(batch, self.modalities)
        members_GBS = share(members_GBS, dim=2)
        if self.config.sequence_parallel:
            members_GBS = sequence_share(members_GBS, dim=2)
        members_GN = members_GBS.transpose(1, 2).flatten(1).double()
        return self.observer.watch(partial(self._add, names, members_GN))

    @torch.no_grad()
    def _add(self, names: list[str], members_GN: torch.Tensor, call: RouterCall) -> None:
        sums_GC = members_GN @ token_table(call)
        for name, sums_C in zip(names, sums_GC, strict=True):
            if name not in self.sums:
                self.sums[name] = sums_C.new_zeros(len(self.layer_freq), self.width)
            self.sums[name][call.layer] += sums_C

    def forget(self) -> None:
        """Drop what was counted since the last `collect`."""
        self.sums.clear()

    def collect(self) -> RoutingSums:
        """The sums of all ranks since the last call. Collective."""
        names = [*self.modalities, *self._all_types()]
        empty = torch.zeros(len(self.layer_freq), self.width, dtype=torch.float64, device=platform.device())
        total_GLC = torch.stack([self.sums.get(name, empty) for name in names])
        # Without sequence parallelism every tensor-parallel rank saw the same tokens; those of images are always divided.
        sees_all = self.component == "language" and not self.config.sequence_parallel
        if sees_all and parallel_state.get_tensor_model_parallel_rank() > 0:
            total_GLC.zero_()
        dist.all_reduce(total_GLC)
        self.sums.clear()
        return RoutingSums(
            groups=tuple(names),
            modalities=self.modalities,
            layers=tuple(layer for layer, is_moe in enumerate(self.layer_freq) if is_moe),
            num_experts=self.moe.num_moe_experts,
            topk=self.moe.moe_router_topk,
            sums_GLC=total_GLC.cpu(),
            admissible=self.admissible,
        )

    def _all_types(self) -> list[str]:
        """Every rank's question types: a rank may not have met one."""
        everywhere: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, [name for name in self.sums if name not in self.modalities])
        return sorted({name for names in everywhere for name in names})


def _admissible(moe: MoEConfig, modalities: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Of each modality the experts that its tokens can choose among: pictures of all kinds are image tokens to a router."""
    of_text, of_images = admissible_experts(moe)
    return (of_text, *(of_images for _ in modalities[1:]))


def token_table(call: RouterCall) -> torch.Tensor:
    """[N, C] in float64: what one token adds to each column."""
    probabilities_NE = call.probabilities_NE
    best_NK = probabilities_NE.topk(min(2, probabilities_NE.shape[1]), dim=-1).values
    columns = [call.map_NE, call.asked_NE, probabilities_NE, torch.ones_like(best_NK[:, :1])]
    columns += [-torch.xlogy(probabilities_NE, probabilities_NE).sum(dim=-1, keepdim=True), best_NK]
    if best_NK.shape[1] == 1:
        columns.append(torch.zeros_like(best_NK))
    return torch.cat([column.double() for column in columns], dim=-1)
