"""A run on so many processes: what each axis divides (`sharding.py`), and which layers each pipeline rank holds."""

import functools
from dataclasses import dataclass, field
from itertools import accumulate

from megatron_moellava.costs.pipeline_split import stage_layers
from megatron_moellava.costs.sharding import Sharding
from megatron_moellava.placement import moe_layer_freq


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout(Sharding):
    """`run` on `world_size` processes."""

    world_size: int
    moe_layers: tuple[bool, ...] = field(init=False)  # for each decoder layer: does it have experts?
    stage_sizes: tuple[int, ...] = field(init=False)  # decoder layers in model order; virtual stages are stages

    def __post_init__(self) -> None:
        moe, layers = self.run.moe, self.backbone.num_layers
        freq = moe_layer_freq(moe.placement, layers) if moe else [0] * layers
        object.__setattr__(self, "moe_layers", tuple(map(bool, freq)))
        object.__setattr__(self, "stage_sizes", tuple(stage_layers(self.run, self.backbone) or self._even_stages()))

    def _even_stages(self) -> list[int]:
        total, first = self.backbone.num_layers, self.run.parallel.num_layers_in_first_pipeline_stage
        ranks = [total // self.pp] * self.pp
        if first is not None:
            ranks = [first, *[(total - first) // (self.pp - 1)] * (self.pp - 1)]
        return [layers // self.vp for layers in ranks] * self.vp

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Data-parallel size of the experts."""
        return self.world_size // (self.pp * self.ep * self.etp)

    @property
    def micro_batches(self) -> int:
        """Per step and data-parallel rank."""
        return self.run.num_microbatches(self.dp)

    def layers_of(self, pipeline_rank: int) -> list[list[int]]:
        """Layer numbers of each chunk of a pipeline rank: 8 layers, pp 2, vp 2, rank 0 -> [[0, 1], [4, 5]]."""
        edges = [0, *accumulate(self.stage_sizes)]
        stages = range(pipeline_rank, self.pp * self.vp, self.pp)
        return [list(range(edges[stage], edges[stage + 1])) for stage in stages]

    def chunk_kinds(self, pipeline_rank: int) -> list[list[bool]]:
        """For each layer of each chunk of a pipeline rank: is it a MoE layer?"""
        return [[self.moe_layers[layer] for layer in chunk] for chunk in self.layers_of(pipeline_rank)]

    def kinds_of(self, pipeline_rank: int) -> list[bool]:
        """The same for all chunks together."""
        return [is_moe for chunk in self.chunk_kinds(pipeline_rank) for is_moe in chunk]

    def in_flight(self, pipeline_rank: int) -> frozenset[tuple[int, ...]]:
        """How many micro-batches each chunk of a rank keeps activations of: every state that a step passes through."""
        return schedule_states(self.pp, pipeline_rank, self.vp, min(self.micro_batches, 4 * self.pp))


@functools.cache
def schedule_states(stages: int, rank: int, chunks: int, micro_batches: int) -> frozenset[tuple[int, ...]]:
    """Megatron-Core's 1F1B schedules: some forward passes ahead, then forward and backward in turn.

    Interleaved, chunk by chunk in groups of `stages` micro-batches (megatron.core.pipeline_parallel.schedules,
    get_pp_rank_microbatches). From four such groups on the states repeat.
    """
    ahead = stages - rank
    if chunks > 1:
        ahead = (stages - rank - 1) * 2 + (chunks - 1) * stages + 1
    counts, states = [0] * chunks, set()
    for step in range(micro_batches * chunks):
        counts[step // stages % chunks] += 1
        states.add(tuple(counts))
        if step + 1 >= ahead:
            counts[-1 - (step + 1 - ahead) // stages % chunks] -= 1
    return frozenset(states)
