"""Which decoder layers a pipeline stage holds: equal numbers, the run's own, or what a cost model finds level.

The first stage also encodes the images, the last one also computes the logits; with equal numbers of layers everybody
waits for one of the two. The work of one row, before any layout, is `flops.py`'s; how many passes it counts for
follows from the stage alone, as if all layers of stages 2 and 3 were trained, and the small projector is left out: finer
passes (by role) would change the layers of runs that are split already.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import ParallelConfig, RunConfig
from megatron_moellava.costs.flops import Work, forward_flops, last_stage_work, layer_work, tower_layers_work, ways
from megatron_moellava.costs.sharding import Sharding
from megatron_moellava.placement import moe_layer_freq
from megatron_moellava.towers import tower_of_run

WORDS_PER_IMAGE = 200  # text tokens beside an image: LLaVA-665k has 30 to 400, by the set
FORWARD_ONLY, TO_INPUT, TRAINED = 1, 2, 3  # a product costs once more for its input's gradient, and for its weight's


def stage_layers(run: RunConfig, backbone: Backbone) -> list[int] | None:
    """Decoder layers of each stage in the order of the model (virtual stages are stages); None: equal numbers."""
    parallel = run.parallel
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if parallel.pipeline_split == "even":
        return None
    if parallel.pipeline_split == "cost":
        first, last = first_stage_cost(run, backbone), last_stage_cost(run, backbone)
        return balanced(layer_costs(run, backbone), stages, first, last)
    return list(parallel.pipeline_split)


def stage_costs(run: RunConfig, backbone: Backbone, layers: list[int]) -> list[float]:
    """The cost of each stage of a split, tower and output layer included."""
    edges = [0, *accumulate(layers)]
    costs = layer_costs(run, backbone)
    stages = [sum(costs[a:b]) for a, b in pairwise(edges)]
    stages[0] += first_stage_cost(run, backbone)
    stages[-1] += last_stage_cost(run, backbone)
    return stages


def balanced(costs: list[float], stages: int, first: float, last: float) -> list[int]:
    """Numbers of layers, at least one each, such that the dearest stage is as cheap as can be.

    Four layers of cost 1 on two stages, of which the first has 2 more to do: [1, 3].
    """
    edges = [0.0, *accumulate(costs)]
    # Layers placed -> (cost of the dearest stage, the numbers of layers).
    best: dict[int, tuple[float, list[int]]] = {0: (first, [])}
    for stage in range(stages):
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        reached = {}
        for end in range(stage + 1, len(costs) - (stages - 1 - stage) + 1):
            candidates = (
                (max(worst, edges[end] - edges[start] + extra), [*numbers, end - start])
                for start, (worst, numbers) in best.items()
                if start < end
            )
            reached[end] = min(candidates)
        best = reached
    return best[len(costs)][1]


def layer_costs(run: RunConfig, backbone: Backbone) -> list[float]:
    """Of every decoder layer; a MoE layer costs its active experts and the shared one."""
    whole, moe = _whole(run, backbone), run.moe
    freq = moe_layer_freq(moe.placement, backbone.num_layers) if moe else [0] * backbone.num_layers
    passes = (TO_INPUT if run.training.stage == 1 else TRAINED) + (run.training.recompute == "full")
    cost = {
        is_moe: passes * _forward(layer_work(whole, bool(is_moe), whole.tokens, run.data.seq_length))
        for is_moe in set(freq)
    }
    return [cost[is_moe] for is_moe in freq]


def first_stage_cost(run: RunConfig, backbone: Backbone) -> float:
    """Of the images of a row: packed samples fill it, a padded row has one. Where frames are pooled, of videos."""
    whole = _whole(run, backbone)
    images, visual = whole.fullest_sample
    visual += images * sum(branch.seen_by(whole.tower).num_features for branch in whole.branches)
    samples = run.data.seq_length / (visual + WORDS_PER_IMAGE) if run.data.packing else 1.0
    passes = TRAINED if "tower" in whole.backpropagates else FORWARD_ONLY
    passes += passes == TRAINED and run.training.recompute_tower
    towers = (tower_layers_work(whole, count, tower=tower) for tower, count, _ in ways(whole, images * samples))
    return passes * sum(map(_forward, towers))


def last_stage_cost(run: RunConfig, backbone: Backbone) -> float:
    """Of the logits."""
    whole = _whole(run, backbone)
    return (TRAINED if run.training.stage == 2 else TO_INPUT) * _forward(last_stage_work(whole, whole.tokens))


def _whole(run: RunConfig, backbone: Backbone) -> Sharding:
    """One row on one process."""
    training = replace(run.training, micro_batch_size=1)
    alone = replace(run, parallel=ParallelConfig(), training=training)
    return Sharding(run=alone, backbone=backbone, tower=tower_of_run(run))


def _forward(works: Iterable[Work]) -> float:
    return sum(forward_flops(work) for work in works)
