"""The products of one micro-batch on one rank, as data: what costs prices and what the dry run counts again.

Only matrix products and attention; everything element-wise is priced by the bytes it moves (costs.py).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moellava.costs.layout import Layout, routed_tokens

CAUSAL = 0.5  # share of the scores that a causal kernel computes


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What one micro-batch holds on average (memory plans for the fullest instead)."""

    tokens: float  # positions computed, padding included
    length: float  # of a sample: how far attention reaches back
    images: float
    samples: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """[rows, inner] x [inner, columns] on this rank, `times` times, with the gradients that its backward pass makes."""

    part: str
    rows: float
    inner: float
    columns: float
    times: int = 1
    weights: float = 1.0  # separate weight matrices that the rows are divided among (local experts)
    input_gradient: bool = True
    weight_gradient: bool = False

    @property
    def forward(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.times

    @property
    def backward(self) -> float:
        return self.forward * (int(self.input_gradient) + int(self.weight_gradient))

    @property
    def forward_bytes(self) -> float:
        """bf16 elements read and written once."""
        elements = self.rows * (self.inner + self.columns) + self.weights * self.inner * self.columns
        return 2.0 * elements * self.times


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Flash attention of `rows` queries over `length` keys, all heads of this rank."""

    rows: float
    length: float
    width: float  # heads x channels of this rank
    causal: bool = True
    with_backward: bool = True
    part: str = "core attention"

    @property
    def forward(self) -> float:
        """Both products in full, as torch's flop counter counts them; the causal half is skipped by real kernels."""
        return 4.0 * self.rows * self.length * self.width

    @property
    def backward(self) -> float:
        """Scores again, and four products of gradients."""
        return 2.5 * self.forward if self.with_backward else 0.0


Work = Product | Attention
# Parts of a decoder layer that each recomputation computes again; None: all of it.
RECOMPUTED: dict[str, tuple[str, ...] | None] = {
    "none": (),
    "selective": ("core attention",),
    "moe": ("core attention", "router", "experts", "shared experts"),
    "full": None,
}


def linear(part: str, rows: float, inner: float, columns: float, trained: bool) -> Product:
    return Product(part=part, rows=rows, inner=inner, columns=columns, weight_gradient=trained)


def layer_work(layout: Layout, is_moe: bool, tokens: float, length: float) -> Iterator[Work]:
    """One decoder layer over `tokens`; attention reaches back over samples of `length`."""
    backbone, tp, trains = layout.backbone, layout.tp, layout.trains
    width, query = backbone.hidden_size, backbone.num_attention_heads * backbone.kv_channels
    qkv = query + 2 * backbone.num_query_groups * backbone.kv_channels
    attention = "language.attention" in trains
    yield linear("attention", tokens, width, qkv / tp, attention)
    yield Attention(rows=tokens, length=length, width=query / tp)
    yield linear("attention", tokens, query / tp, width, attention)
    if not is_moe or layout.moe.use_residual:
        yield from mlp_work(layout, "ffn", tokens, backbone.ffn_hidden_size / tp, "language.ffn" in trains)
    if is_moe:
        yield from moe_work(layout, tokens)


def moe_work(layout: Layout, tokens: float) -> Iterator[Work]:
    """Router, routed experts (balanced), shared experts."""
    moe, trains = layout.moe, layout.trains
    yield linear("router", tokens / layout.sp, layout.backbone.hidden_size, moe.num_moe_experts, "router" in trains)
    rows = routed_tokens(layout) * tokens / layout.tokens
    local, inner = moe.num_moe_experts / layout.ep, layout.backbone.ffn_hidden_size / layout.etp
    yield from mlp_work(layout, "experts", rows, inner, "experts" in trains, weights=local)
    if moe.moe_shared_expert_intermediate_size:
        inner = moe.moe_shared_expert_intermediate_size / layout.tp
        yield from mlp_work(layout, "shared experts", tokens, inner, "experts" in trains)


def mlp_work(
    layout: Layout, part: str, rows: float, inner: float, trained: bool, weights: float = 1.0
) -> Iterator[Product]:
    width, gated = layout.backbone.hidden_size, 2 if layout.backbone.gated_linear_unit else 1
    for shape in ((width, gated * inner), (inner, width)):
        yield Product(part=part, rows=rows, inner=shape[0], columns=shape[1], weights=weights, weight_gradient=trained)


def first_stage_work(layout: Layout, images: float) -> Iterator[Work]:
    """Tower and projector over `images`."""
    tower, hidden = layout.tower, layout.backbone.hidden_size
    yield Product(
        part="tower",
        rows=images * tower.num_patches,
        inner=3 * tower.patch_size**2,
        columns=tower.hidden_size,
        input_gradient=False,
        weight_gradient="tower" in layout.trains,
    )
    yield from tower_layers_work(layout, images)
    visual, projects = images * tower.num_features, "projector" in layout.trains
    # Megatron-Core's linear layer computes the gradient of the frozen tower's features too.
    yield linear("projector", visual, tower.hidden_size, hidden / layout.tp, projects)
    yield linear("projector", visual, hidden / layout.tp, hidden, projects)


def tower_layers_work(layout: Layout, images: float) -> Iterator[Work]:
    """The transformer layers of the tower that features need."""
    tower, tp, trained = layout.tower, layout.tp, "tower" in layout.trains
    rows, width, inner, layers = (
        images * tower.num_positions,
        tower.hidden_size,
        tower.ffn_hidden_size,
        tower.num_used_layers,
    )
    for inputs, outputs in ((width, 3 * width / tp), (width / tp, width), (width, inner / tp), (inner / tp, width)):
        yield Product(
            part="tower",
            rows=rows,
            inner=inputs,
            columns=outputs,
            times=layers,
            input_gradient=trained,
            weight_gradient=trained,
        )
    yield from [
        Attention(
            rows=rows,
            length=tower.num_positions,
            width=width / tp,
            causal=False,
            with_backward=trained,
            part="tower",
        )
    ] * layers


def last_stage_work(layout: Layout, tokens: float) -> Iterator[Work]:
    """The output layer over every position, image tokens included, as Megatron-Core computes it."""
    columns = layout.vocabulary / layout.tp
    yield linear("output", tokens, layout.backbone.hidden_size, columns, "language.embedding" in layout.trains)


def decoder_work(layout: Layout, pipeline_rank: int, tokens: float, length: float) -> Iterator[Work]:
    """All decoder layers of a pipeline rank; layers of one kind do the same."""
    for is_moe, count in Counter(layout.kinds_of(pipeline_rank)).items():
        yield from list(layer_work(layout, is_moe, tokens, length)) * count


def recomputed_work(layout: Layout, pipeline_rank: int, tokens: float, length: float, images: float) -> Iterator[Work]:
    """What the backward pass of one micro-batch computes again."""
    if pipeline_rank == 0 and layout.run.training.recompute_tower and "tower" in layout.trains:
        yield from tower_layers_work(layout, images)
    parts = RECOMPUTED[layout.run.training.recompute]
    for work in decoder_work(layout, pipeline_rank, tokens, length):
        if parts is None or work.part in parts:
            yield work


def stage_work(layout: Layout, pipeline_rank: int, tokens: float, length: float, images: float) -> Iterator[Work]:
    """Everything that one pipeline rank computes for one micro-batch, recomputation apart."""
    if pipeline_rank == 0:
        yield from first_stage_work(layout, images)
    yield from decoder_work(layout, pipeline_rank, tokens, length)
    if pipeline_rank == layout.pp - 1:
        yield from last_stage_work(layout, tokens)


def model_flops(layout: Layout, load: Load, causal: float = CAUSAL) -> float:
    """FLOPs that one micro-batch needs on all its model-parallel ranks together: forward, gradients of activations, and
    gradients of what is trained. Recomputation and attention above the diagonal do not count."""
    total = 0.0
    for rank in range(layout.pp):
        for work in stage_work(layout, rank, load.tokens, load.length, load.images):
            if isinstance(work, Attention):
                total += 3 * work.forward * (causal if work.causal else 1.0) if work.with_backward else work.forward
            else:
                # Routed tokens of all tensor ranks are the whole; the router's rows are split too.
                total += work.forward + work.backward
    return total * layout.tp
