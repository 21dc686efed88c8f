"""How many parameters each role has on one rank, from the shapes that model/ builds. Checked against the built model.

Elements after tensor and expert parallelism. Experts are reduced over fewer ranks than the rest, so they stay apart.
"""

from collections import Counter

from megatron_moellava.costs.layout import Layout
from megatron_moellava.towers import Tower

SHARED = "shared experts"  # of role `experts`, but whole on every expert rank and reduced like the dense layers
FP32_ROLE = "router"  # kept in fp32 whatever the run's precision


def role_of(part: str) -> str:
    """The training role of a key of `parameters_of`."""
    return "experts" if part == SHARED else part


def parameters_of(layout: Layout, pipeline_rank: int) -> Counter:
    """role -> parameters of this pipeline rank (of any of its tensor, expert and data ranks)."""
    count: Counter = Counter()
    if pipeline_rank == 0:
        count["tower"] = tower_parameters(layout.tower, layout.tp)
        count["projector"] = projector_parameters(layout)
        count["language.embedding"] += layout.vocabulary // layout.tp * layout.backbone.hidden_size
    for is_moe, layers in Counter(layout.kinds_of(pipeline_rank)).items():
        for part, number in layer_parameters(layout, is_moe).items():
            count[part] += layers * number
    if pipeline_rank == layout.pp - 1:
        count["language.norm"] += norm_parameters(layout)
        count["language.embedding"] += output_parameters(layout)
    return count


def layer_parameters(layout: Layout, is_moe: bool) -> Counter:
    """One decoder layer."""
    backbone = layout.backbone
    norms = 1 if backbone.parallel_residual else 2
    count = Counter(
        {"language.attention": attention_parameters(layout), "language.norm": norms * norm_parameters(layout)}
    )
    if not is_moe:
        count["language.ffn"] = mlp_parameters(layout, backbone.ffn_hidden_size)
        return count
    moe, width = layout.moe, backbone.hidden_size
    local = moe.num_moe_experts // layout.ep
    count["experts"] = local * mlp_parameters(layout, backbone.ffn_hidden_size, split=layout.etp)
    count["router"] = moe.num_moe_experts * width
    if moe.use_residual:
        count["language.ffn"] = mlp_parameters(layout, backbone.ffn_hidden_size)
        count["router"] += 2 * width + 2
    if moe.moe_shared_expert_intermediate_size:
        count[SHARED] = mlp_parameters(layout, moe.moe_shared_expert_intermediate_size)
    return count


def attention_parameters(layout: Layout) -> int:
    backbone, tp = layout.backbone, layout.tp
    query = backbone.num_attention_heads * backbone.kv_channels
    qkv = query + 2 * backbone.num_query_groups * backbone.kv_channels
    count = qkv * backbone.hidden_size // tp + query * backbone.hidden_size // tp
    if backbone.add_bias_linear or backbone.add_qkv_bias:
        count += qkv // tp
    if backbone.add_bias_linear:
        count += backbone.hidden_size
    return count + (2 * backbone.kv_channels * _norm_vectors(layout) if backbone.qk_layernorm else 0)


def mlp_parameters(layout: Layout, inner: int, split: int | None = None) -> int:
    """fc1 and fc2 of one FFN or expert, split over `split` ranks (default: tensor parallelism)."""
    backbone, split = layout.backbone, split or layout.tp
    fc1 = inner * (2 if backbone.gated_linear_unit else 1) // split
    count = fc1 * backbone.hidden_size + inner // split * backbone.hidden_size
    return count + (fc1 + backbone.hidden_size if backbone.add_bias_linear else 0)


def norm_parameters(layout: Layout) -> int:
    return layout.backbone.hidden_size * _norm_vectors(layout)


def _norm_vectors(layout: Layout) -> int:
    return 2 if layout.backbone.normalization == "LayerNorm" else 1


def output_parameters(layout: Layout) -> int:
    """The output layer of the last stage; tied weights exist twice only when the pipeline separates the two ends."""
    backbone = layout.backbone
    rows = layout.vocabulary // layout.tp
    weight = 0 if backbone.share_embeddings_and_output_weights and layout.pp == 1 else rows * backbone.hidden_size
    return weight + (rows if backbone.output_layer_bias else 0)


def projector_parameters(layout: Layout) -> int:
    width, tp = layout.backbone.hidden_size, layout.tp
    return (layout.tower.hidden_size * width + width + width * width) // tp + width


def tower_parameters(tower: Tower, tp: int) -> int:
    """The layers that features need; biases everywhere but in CLIP's patches."""
    width, inner = tower.hidden_size, tower.ffn_hidden_size
    attention = (4 * width * width + 3 * width) // tp + width
    mlp = (2 * width * inner + inner) // tp + width
    layer = attention + mlp + 4 * width
    stem = 3 * tower.patch_size**2 * width + tower.num_positions * width
    stem += width * (int(tower.patch_bias) + int(tower.class_token) + 2 * int(tower.pre_layernorm))
    return tower.num_used_layers * layer + stem
