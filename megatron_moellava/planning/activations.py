"""What autograd keeps of one micro-batch until its backward pass, as a table for each set of modules.

`LOCAL` are the modules of a machine without Transformer Engine. The tests compare it with what autograd really saved on
a CPU. `TE` are Transformer Engine's fused modules and flash attention; it follows from their sources and has not been
measured. A row applies when all its conditions hold, and is counted `times` the size it names.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_moellava.costs.flops import ways
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.shapes import latent_matrices
from megatron_moellava.costs.sharding import routed_tokens
from megatron_moellava.stages import adapted_roles
from megatron_moellava.towers import Tower

FP32, MASK = 4, 1


@dataclass(frozen=True, slots=True)
class Saved:
    """One kind of tensor that a backward pass needs."""

    what: str
    # attention, core attention, residual, mlp norm, ffn, moe, moe act, residual moe, angles, turns, start, end
    part: str
    size: str  # a key of `sizes`
    times: int = 1
    bytes: int | None = None  # per element; None: the run's precision
    when: tuple[str, ...] = ()  # conditions, "!" negates: a role that is trained, or a property of the backbone


COMMON = (
    Saved("keys after rotation", "attention", "key"),
    Saved("queries after rotation", "attention", "query"),
    Saved("qkv, kept alive by the values", "attention", "qkv"),
    Saved(
        "context, input of the output projection", "attention", "query", when=("language.attention", "!narrow_values")
    ),
    Saved("context", "core attention", "query", when=("!language.attention", "!narrow_values")),
    Saved("context as wide as the keys", "core attention", "query", when=("narrow_values",)),
    Saved(
        "context, input of the output projection", "attention", "value", when=("language.attention", "narrow_values")
    ),
    Saved("latents, inputs of their projections", "attention", "latents", when=("language.attention", "latent")),
    Saved("log-sum-exp of the softmax", "core attention", "heads", bytes=FP32),
    Saved("queries in fp32 for a norm over all heads", "attention", "query", bytes=FP32, when=("heads_norm",)),
    Saved("keys in fp32 for a norm over all heads", "attention", "key", bytes=FP32, when=("heads_norm",)),
    Saved("the same, normed", "attention", "query", when=("heads_norm", "language.attention")),
    Saved("the same, normed", "attention", "key", when=("heads_norm", "language.attention")),
    Saved("fc1's output", "ffn", "inner_in"),
    Saved("fc2's input", "ffn", "inner", when=("language.ffn",)),
    Saved("input of the gate", "moe", "hidden", when=("router", "!qkv_input_kept")),
    Saved("dropout mask of the embeddings", "start", "hidden", when=("dropout", "language.embedding")),
    Saved("dispatched tokens, input of fc1", "moe", "expert_hidden", when=("experts",)),
    Saved("fc1's output", "moe", "expert_inner_in"),
    Saved("fc2's input", "moe act", "expert_inner", when=("experts",)),
    Saved("shared experts: fc1's output", "moe", "shared_inner_in", when=("shared",)),
    Saved("shared experts: fc2's input", "moe", "shared_inner", when=("shared", "experts")),
    Saved("shared experts: output before its gate", "moe", "hidden", when=("shared_gate",)),
    Saved("A x of the adapters of qkv and of the projection", "attention", "attention_ranks"),
    Saved("A x of the adapters of fc1 and fc2", "ffn", "ffn_ranks"),
    Saved("A x of the experts' adapters", "moe", "expert_ranks"),
    Saved("A x of the shared experts' adapters", "moe", "shared_ranks"),
    Saved("context before the adapter's dropout", "core attention", "context_dropped"),
    Saved("rotary angles for recomputed layers, once per chunk", "angles", "rotary", bytes=FP32),
    Saved("softmax of the loss", "end", "logits", bytes=FP32),
    Saved("which logits are of the teacher's tokens", "end", "logits", bytes=MASK, when=("distilled",)),
    Saved("input of the output layer", "end", "hidden", when=("language.embedding",)),
    Saved("visual features, input of fc1", "start", "features", when=("projector",)),
    Saved("fc1's output and fc2's input", "start", "projected", times=2, when=("projector",)),
    Saved("trained tower: layers", "start", "tower_layers", when=("tower", "!recompute_tower")),
    Saved("trained tower: inputs of layers", "start", "tower_inputs", when=("tower", "recompute_tower")),
)

LOCAL = (
    *COMMON,
    Saved("masks of the adapters' dropout", "attention", "attention_dropped"),
    Saved("masks of the adapters' dropout", "ffn", "ffn_dropped"),
    Saved("masks of the adapters' dropout", "moe", "expert_dropped"),
    # A tensor rank's share is a view: whoever keeps the first layer's input keeps the embeddings of all ranks.
    Saved("embeddings of the other tensor ranks", "start", "unsplit"),
    Saved("input of the norm", "attention", "hidden"),
    Saved("input of qkv", "attention", "hidden", when=("language.attention",)),
    Saved("rotary angles", "attention", "rotary", times=4, when=("latent",)),
    Saved("cosines and sines, once per chunk", "turns", "turned", times=2, when=("!latent",)),
    Saved("latents for their norms", "attention", "latents", when=("latent",)),
    Saved("queries for their norm", "attention", "query", when=("qk_norm", "!heads_norm")),
    Saved("keys for their norm", "attention", "key", when=("qk_norm", "!heads_norm")),
    Saved("dropout masks of attention and FFN", "residual", "hidden", times=2, when=("dropout",)),
    Saved("input of the norm", "mlp norm", "hidden", when=("!parallel_residual",)),
    Saved("input of fc1", "ffn", "hidden", when=("language.ffn", "!qkv_input_kept")),
    Saved("gate after its activation, linear half", "ffn", "inner", times=2, when=("gated",)),
    Saved("gate after its activation, linear half", "moe", "expert_inner", times=2, when=("gated", "!grouped")),
    Saved("activation before the router's weight", "moe", "expert_inner", when=("!grouped",)),
    Saved("gate after its activation, linear half", "moe", "shared_inner", times=2, when=("shared", "gated")),
    Saved("input of the last norm", "end", "hidden"),
    Saved("residual experts: expert and dense outputs", "residual moe", "hidden", times=2),
)

TE = (
    *COMMON,
    Saved("masks of the adapters' dropout", "attention", "attention_dropped", bytes=MASK),
    Saved("masks of the adapters' dropout", "ffn", "ffn_dropped", bytes=MASK),
    Saved("masks of the adapters' dropout", "moe", "expert_dropped", bytes=MASK),
    Saved("embeddings of the other tensor ranks", "start", "unsplit"),
    Saved("input of the norm", "attention", "hidden"),
    Saved("input of qkv", "attention", "hidden", when=("language.attention",)),
    Saved("queries for their norm", "attention", "query", when=("qk_norm", "!heads_norm")),
    Saved("keys for their norm", "attention", "key", when=("qk_norm", "!heads_norm")),
    Saved("latents for their norms", "attention", "latents", when=("latent",)),
    Saved("dropout masks of attention and FFN", "residual", "hidden", times=2, bytes=MASK, when=("dropout",)),
    Saved("input of the norm", "mlp norm", "hidden", when=("!parallel_residual",)),
    Saved("input of fc1", "ffn", "hidden", when=("language.ffn", "!qkv_input_kept")),
    Saved("activation before the router's weight", "moe act", "expert_inner", when=("!gated",)),
    Saved("input of the last norm", "end", "hidden"),
    Saved("residual experts: expert and dense outputs", "residual moe", "hidden", times=2),
)
MODULE_SETS = {"local": LOCAL, "te": TE}

# Parts that a recomputation throws away.
DROPPED = {
    "none": (),
    "selective": (
        "core attention",
    ),  # little: queries, keys and values stay, and the context if its projection is trained
    "moe_act": ("moe act",),
    "moe": ("core attention", "moe", "moe act"),
    "full": ("attention", "core attention", "residual", "mlp norm", "ffn", "moe", "moe act", "residual moe"),
}


def sizes(layout: Layout, imbalance: float = 1.0) -> dict[str, float]:
    """Elements on one rank of everything that `Saved.size` may name, for one micro-batch."""
    backbone, tokens, tp = layout.backbone, layout.tokens, layout.tp
    split, latent = layout.sp, backbone.multi_latent_attention
    gated = 2 if backbone.gated_linear_unit else 1
    query = tokens * backbone.num_attention_heads * backbone.kv_channels / tp
    key = tokens * backbone.num_query_groups * backbone.kv_channels / tp
    values = {
        "hidden": tokens * backbone.hidden_size / split,
        "unsplit": tokens * backbone.hidden_size * (1 - 1 / split),
        "query": query,
        "key": key,
        "qkv": query + 2 * key if latent is None else key,  # latent: the values, filled up to the width of the keys
        "heads": tokens * backbone.num_attention_heads / tp,
        "rotary": tokens * backbone.rotary_channels * backbone.rotary_percent,
        "turned": (query if backbone.num_query_groups == backbone.num_attention_heads else query + key)
        * backbone.rotary_percent,
        "inner": tokens * backbone.ffn_hidden_size / tp,
        "inner_in": gated * tokens * backbone.ffn_hidden_size / tp,
        "logits": tokens * layout.vocabulary / tp,
    }
    values |= _tower_sizes(layout)
    if latent is not None:
        values["value"] = tokens * backbone.num_attention_heads * latent.v_head_dim / tp
        values["latents"] = tokens * ((latent.q_lora_rank or 0) + latent.kv_lora_rank) / split
    values |= _expert_sizes(layout, imbalance, gated) if layout.run.moe else {}
    return values | _adapter_sizes(layout, values, gated)


def _tower_sizes(layout: Layout) -> dict[str, float]:
    """Of plain pictures and of all that are apart together."""
    found = {"features": 0.0, "projected": 0.0, "tower_layers": 0.0, "tower_inputs": 0.0}
    mixture, sparse = layout.run.projector_moe, len(layout.model.tower_moe_layers)
    routed = mixture.moe_router_topk if mixture else 0  # copies of each visual token that the projector's experts take
    for tower, images, _ in ways(layout, layout.images):
        visual, layers = images * tower.num_features, tower.num_used_layers
        found["features"] += visual * tower.projector_input_size * (1 + routed / layout.tp)
        found["projected"] += visual * layout.backbone.hidden_size / layout.tp * max(routed, 1)
        found["tower_layers"] += (layers - sparse) * tower_layer_elements(layout, tower)
        found["tower_layers"] += sparse * tower_layer_elements(layout, tower, is_moe=True)
        found["tower_inputs"] += layers * images * tower.num_rows * tower.hidden_size
    return found


def tower_layer_elements(layout: Layout, tower: Tower, is_moe: bool = False) -> float:
    """What one layer of a tower makes for one micro-batch: residual stream and norms whole, products split.

    Attention across the frames of videos has a norm of its own, too. Of experts top-k inner values and copies of each row,
    before and behind them.
    """
    moe = layout.run.tower_moe
    routed = moe.moe_router_topk if moe and is_moe else 0
    inner = 3 if tower.activation == "quick_gelu" else 2  # x * sigmoid(1.7 x) keeps one more than a fused GELU
    attentions = 2 if tower.takes_videos else 1
    whole = (2 + 2 * attentions) * tower.hidden_size
    split = (4 * attentions + 2 * routed) * tower.hidden_size + inner * tower.ffn_hidden_size * max(routed, 1)
    return layout.images * tower.num_rows * (whole + split / layout.tp)


def _expert_sizes(layout: Layout, imbalance: float, gated: int) -> dict[str, float]:
    backbone, moe = layout.backbone, layout.moe
    rows, inner = routed_tokens(layout, imbalance), layout.expert_inner
    shared = layout.tokens * (moe.moe_shared_expert_intermediate_size or 0) / layout.tp
    return {
        "expert_hidden": rows * backbone.hidden_size,
        "expert_inner": rows * inner,
        "expert_inner_in": gated * rows * inner,
        "expert_columns": moe.num_moe_experts / layout.ep * gated * inner,
        "shared_inner": shared,
        "shared_inner_in": gated * shared,
    }


def _adapter_sizes(layout: Layout, values: dict[str, float], gated: int) -> dict[str, float]:
    """Of a role without adapters nothing. What A x is gathered from is split where positions are."""
    if layout.lora is None:
        return {}
    rank, tokens, split = layout.lora.rank, layout.tokens, layout.tokens / layout.sp
    mlp = (gated * tokens + split) * rank
    found: dict[str, float] = {}
    if "language.attention" in adapted_roles(layout.lora):
        found |= _attention_adapter_sizes(layout, values)
    if "language.ffn" in adapted_roles(layout.lora):
        found |= {"ffn_ranks": mlp, "ffn_dropped": values["hidden"] + values["inner"]}
    if "experts" in adapted_roles(layout.lora) and layout.run.moe:
        rows = values["expert_hidden"] / layout.backbone.hidden_size
        found["expert_ranks"] = (gated + 1) * rows * rank
        found["expert_dropped"] = values["expert_hidden"] + values["expert_inner"]
        found["shared_ranks"] = mlp if layout.moe.moe_shared_expert_intermediate_size else 0.0
    dropped = {name for name in found if name.endswith("dropped")}
    return {name: size for name, size in found.items() if layout.lora.dropout or name not in dropped}


def _attention_adapter_sizes(layout: Layout, values: dict[str, float]) -> dict[str, float]:
    """What each matrix's A x is, and what their dropout leaves: of q, k and v as one, or of the matrices around the latents."""
    assert layout.lora is not None
    rank, tokens, split, backbone = layout.lora.rank, layout.tokens, layout.tokens / layout.sp, layout.backbone
    inputs, projections, context = values["hidden"], 3, values["query"]
    if backbone.multi_latent_attention is not None:
        matrices = latent_matrices(backbone).values()
        inputs, projections = split * sum(columns for _, columns in matrices), len(matrices)
        context = values["value"]
    return {
        "attention_ranks": (projections * tokens + split) * rank,
        "attention_dropped": inputs + context,
        "context_dropped": context,
    }


def conditions(layout: Layout) -> set[str]:
    """Everything that `Saved.when` may ask for and that holds."""
    backbone, moe = layout.backbone, layout.run.moe
    held = {
        "gated": backbone.gated_linear_unit,
        "qk_norm": backbone.qk_layernorm,
        "latent": backbone.multi_latent_attention is not None,
        "narrow_values": backbone.value_channels < backbone.kv_channels,  # filled up for the kernels, and cut again
        "heads_norm": backbone.qk_layernorm and backbone.qk_layernorm_spans_heads,
        "dropout": backbone.hidden_dropout > 0,
        "parallel_residual": backbone.parallel_residual,
        # One norm feeds attention and FFN alike: its output is kept once for both.
        "qkv_input_kept": backbone.parallel_residual
        and "language.attention" in layout.backpropagates
        and not (layout.lora and layout.lora.dropout),  # adapters keep what dropout has left, each its own
        "distilled": layout.run.training.distillation is not None,
        "recompute_tower": layout.run.training.recompute_tower,
        "grouped": moe is not None and moe.moe_grouped_gemm,
        "shared": moe is not None and bool(moe.moe_shared_expert_intermediate_size),
        "shared_gate": moe is not None and moe.moe_shared_expert_gate,
    }
    recompute = f"recompute={layout.run.training.recompute}"
    return {name for name, holds in held.items() if holds} | layout.backpropagates | {recompute}


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes that a rank keeps for one micro-batch."""

    layers: tuple[tuple[tuple[float, float], ...], ...]  # chunk -> layer -> (kept, made again by the recomputation)
    chunks: tuple[float, ...]  # all that each chunk keeps
    end: float  # what the loss keeps, part of the last chunk

    @property
    def total(self) -> float:
        """Of one micro-batch through all chunks."""
        return sum(self.chunks)

    def peak(self, states: Iterable[tuple[int, ...]]) -> float:
        """Of the dearest state of a pipeline schedule (`Layout.in_flight`)."""
        return max(sum(count * kept for count, kept in zip(counts, self.chunks, strict=True)) for counts in states)


def layer_parts(layout: Layout, is_moe: bool) -> set[str]:
    """The parts (see `Saved.part`) of one layer."""
    parts = {"attention", "core attention", "residual", "mlp norm"}
    if not is_moe:
        return parts | {"ffn"}
    return parts | {"moe", "moe act"} | ({"residual moe", "ffn"} if layout.moe.use_residual else set())


def part_bytes(layout: Layout, modules: str, imbalance: float = 1.0) -> dict[str, float]:
    """part -> bytes of one micro-batch, each part once, nothing recomputed."""
    table, held, elements = MODULE_SETS[modules], conditions(layout), sizes(layout, imbalance)
    result: dict[str, float] = {}
    for row in table:
        if all((name[1:] not in held) if name.startswith("!") else name in held for name in row.when):
            size = elements.get(row.size, 0.0) * (row.bytes or layout.activation_bytes)
            result[row.part] = result.get(row.part, 0.0) + row.times * size
    return result


def activations_of(layout: Layout, pipeline_rank: int, modules: str, imbalance: float = 1.0) -> Activations:
    """Of one micro-batch on any rank of a pipeline stage."""
    bytes_of = part_bytes(layout, modules, imbalance)
    kinds = layout.chunk_kinds(pipeline_rank)
    layer = {is_moe: layer_bytes(layout, bytes_of, is_moe) for is_moe in {kind for chunk in kinds for kind in chunk}}
    layers = tuple(tuple(layer[is_moe] for is_moe in chunk) for chunk in kinds)
    chunks = [sum(kept for kept, _ in chunk) for chunk in layers]
    of_all_layers = "angles" if layout.run.training.recompute == "full" else "turns"
    chunks = [kept + bytes_of.get(of_all_layers, 0.0) for kept in chunks]
    end = bytes_of["end"] if pipeline_rank == layout.pp - 1 else 0.0
    chunks[0] += bytes_of.get("start", 0.0) if pipeline_rank == 0 else 0.0
    chunks[-1] += end
    return Activations(layers=layers, chunks=tuple(chunks), end=end)


def layer_bytes(layout: Layout, bytes_of: dict[str, float], is_moe: bool) -> tuple[float, float]:
    """(kept, made again by the recomputation) of one decoder layer."""
    present, dropped = layer_parts(layout, is_moe), set(DROPPED[layout.run.training.recompute])
    kept = sum(bytes_of.get(part, 0.0) for part in present - dropped)
    if present & (dropped - {"core attention", "moe act"}):  # the input that the recomputation starts from
        kept += sizes(layout)["hidden"] * layout.activation_bytes
    return kept, sum(bytes_of.get(part, 0.0) for part in present & dropped)
