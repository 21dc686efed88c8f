"""Which decoder layers a pipeline stage holds: equal numbers, the run's own, or what a cost model finds level.

The first stage also encodes the images, the last one also computes the logits; with equal numbers of layers everybody
waits for one of the two. Costs are floating-point operations of one row, forward and backward, before any layout: every
stage is divided alike.
"""

from itertools import accumulate, pairwise

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import RunConfig
from megatron_moellava.placement import moe_layer_freq
from megatron_moellava.towers import Tower, get_tower

WORDS_PER_IMAGE = 200  # text tokens beside an image: LLaVA-665k has 30 to 400, by the set
FORWARD_ONLY, TO_INPUT, TRAINED = 1, 2, 3  # a product costs once more for its input's gradient, and for its weight's


def stage_layers(run: RunConfig, backbone: Backbone) -> list[int] | None:
    """Decoder layers of each stage in the order of the model (virtual stages are stages); None: equal numbers."""
    parallel = run.parallel
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if parallel.pipeline_split == "even":
        return None
    if parallel.pipeline_split == "cost":
        tower = get_tower(run.model.tower)
        return balanced(
            layer_costs(run, backbone), stages, first_stage_cost(run, tower), last_stage_cost(run, backbone)
        )
    return list(parallel.pipeline_split)


def stage_costs(run: RunConfig, backbone: Backbone, layers: list[int]) -> list[float]:
    """The cost of each stage of a split, tower and output layer included."""
    edges = [0, *accumulate(layers)]
    costs = layer_costs(run, backbone)
    stages = [sum(costs[a:b]) for a, b in pairwise(edges)]
    stages[0] += first_stage_cost(run, get_tower(run.model.tower))
    stages[-1] += last_stage_cost(run, backbone)
    return stages


def balanced(costs: list[float], stages: int, first: float, last: float) -> list[int]:
    """Numbers of layers, at least one each, such that the dearest stage is as cheap as can be.

    Four layers of cost 1 on two stages, of which the first has 2 more to do: [1, 3].
    """
    edges = [0.0, *accumulate(costs)]
    best = {0: (first, [])}  # layers placed -> (cost of the dearest stage, the numbers of layers)
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
    heads = backbone.num_attention_heads * backbone.kv_channels
    keys = 2 * backbone.num_query_groups * backbone.kv_channels
    attention = backbone.hidden_size * (2 * heads + keys) + heads * run.data.seq_length  # a causal row: half of S x S
    products = 3 if backbone.gated_linear_unit else 2
    ffn = products * backbone.hidden_size * backbone.ffn_hidden_size
    moe = run.moe
    active = ffn
    if moe is not None:
        shared = moe.moe_shared_expert_intermediate_size or 0
        active = ffn * (moe.moe_router_topk + moe.use_residual) + products * backbone.hidden_size * shared
    freq = moe_layer_freq(moe.placement, backbone.num_layers) if moe else [0] * backbone.num_layers
    times = (TO_INPUT if run.training.stage == 1 else TRAINED) + (run.training.recompute == "full")
    return [2.0 * run.data.seq_length * times * (attention + (active if is_moe else ffn)) for is_moe in freq]


def first_stage_cost(run: RunConfig, tower: Tower) -> float:
    """Of the images of a row: packed samples fill it, a padded row has one."""
    images = run.data.seq_length / (tower.num_features + WORDS_PER_IMAGE) if run.data.packing else 1.0
    width, tokens = tower.hidden_size, tower.num_positions
    layer = width * (4 * width + 2 * tower.ffn_hidden_size + 2 * tokens)
    times = TRAINED if "tower" in (run.training.trains or ()) else FORWARD_ONLY
    times += times == TRAINED and run.training.recompute_tower
    return 2.0 * images * tokens * times * tower.num_used_layers * layer


def last_stage_cost(run: RunConfig, backbone: Backbone) -> float:
    """Of the logits."""
    times = TRAINED if run.training.stage == 2 else TO_INPUT
    return 2.0 * run.data.seq_length * times * backbone.hidden_size * backbone.vocab_size
