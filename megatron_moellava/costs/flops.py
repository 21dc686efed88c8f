"""The products of one micro-batch on one rank, as data: what costs prices and what the dry run counts again.

Only matrix products and attention; everything element-wise is priced by the bytes it moves (planning/pricing.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_moellava.config import MoEConfig
from megatron_moellava.costs.shapes import latent_matrices
from megatron_moellava.costs.sharding import Sharding, routed_tokens
from megatron_moellava.stages import adapted_roles
from megatron_moellava.towers import Tower

CAUSAL = 0.5  # share of the scores that a causal kernel computes


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
    copies: int = 1  # tensor-parallel ranks that all compute this same product

    @property
    def forward(self) -> float:
        """FLOPs: a multiplication and an addition for each element of each product."""
        return 2.0 * self.rows * self.inner * self.columns * self.times

    @property
    def backward(self) -> float:
        """FLOPs of the gradients that are computed."""
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
    value_width: float | None = None  # that of the values; None: the same. Kernels fill narrower ones up
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


def linear(part: str, rows: float, inner: float, columns: float, trained: bool) -> Product:
    """A linear layer's product [rows, inner] x [inner, columns]; `trained`: its weight gets a gradient."""
    return Product(part=part, rows=rows, inner=inner, columns=columns, weight_gradient=trained)


def layer_work(sharding: Sharding, is_moe: bool, tokens: float, length: float) -> Iterator[Work]:
    """One decoder layer over `tokens`; attention reaches back over samples of `length`."""
    backbone, tp, trains = sharding.backbone, sharding.tp, sharding.trains
    split, latent = tokens / sharding.sp, backbone.multi_latent_attention is not None
    yield from (latent_attention_work if latent else attention_work)(sharding, tokens, length)
    if not is_moe or sharding.moe.use_residual:
        inner = backbone.ffn_hidden_size / tp
        yield from mlp_work(sharding, "ffn", tokens, inner, "language.ffn" in trains)
        yield from mlp_adapter_work(sharding, "ffn", "language.ffn", (tokens, split), inner)
    if is_moe:
        yield from moe_work(sharding, tokens)


def attention_work(sharding: Sharding, tokens: float, length: float) -> Iterator[Work]:
    """Queries, keys and values by one matrix, scores, and the projection of what they sum up."""
    backbone, tp = sharding.backbone, sharding.tp
    width, query = backbone.hidden_size, backbone.num_attention_heads * backbone.kv_channels
    qkv = query + 2 * backbone.num_query_groups * backbone.kv_channels
    attention = "language.attention" in sharding.trains
    split = tokens / sharding.sp
    yield linear("attention", tokens, width, qkv / tp, attention)
    yield Attention(rows=tokens, length=length, width=query / tp)
    yield linear("attention", tokens, query / tp, width, attention)
    yield from adapter_work(sharding, "attention", "language.attention", (split, width, 3), (tokens, qkv / tp))
    yield from adapter_work(sharding, "attention", "language.attention", (tokens, query / tp, 1), (split, width))


def latent_attention_work(sharding: Sharding, tokens: float, length: float) -> Iterator[Work]:
    """The same of multi-latent attention: a matrix each for queries (or two) and for the latent and what comes of it."""
    backbone, tp = sharding.backbone, sharding.tp
    query, value = (backbone.num_attention_heads * size for size in (backbone.kv_channels, backbone.value_channels))
    attention, split, width = "language.attention" in sharding.trains, tokens / sharding.sp, backbone.hidden_size
    for rows, columns in latent_matrices(backbone).values():
        yield linear("attention", tokens, columns, rows / tp, attention)
        yield from adapter_work(sharding, "attention", "language.attention", (split, columns, 1), (tokens, rows / tp))
    yield Attention(rows=tokens, length=length, width=query / tp, value_width=value / tp)
    yield linear("attention", tokens, value / tp, width, attention)
    yield from adapter_work(sharding, "attention", "language.attention", (tokens, value / tp, 1), (split, width))


def moe_work(sharding: Sharding, tokens: float) -> Iterator[Work]:
    """Router, routed experts (balanced), shared experts."""
    moe, trains = sharding.moe, sharding.trains
    yield linear("router", tokens / sharding.sp, sharding.backbone.hidden_size, moe.num_moe_experts, "router" in trains)
    rows = routed_tokens(sharding) * tokens / sharding.tokens
    local = moe.num_moe_experts / sharding.ep
    yield from mlp_work(sharding, "experts", rows, sharding.expert_inner, "experts" in trains, weights=local)
    yield from mlp_adapter_work(sharding, "experts", "experts", (rows, rows), sharding.expert_inner, weights=local)
    if moe.moe_shared_expert_intermediate_size:
        inner = moe.moe_shared_expert_intermediate_size / sharding.tp
        yield from mlp_work(sharding, "shared experts", tokens, inner, "experts" in trains)
        if moe.moe_shared_expert_gate:
            rows, width = tokens / sharding.sp, sharding.backbone.hidden_size
            yield linear("shared experts", rows, width, 1, "experts" in trains)
        yield from mlp_adapter_work(sharding, "shared experts", "experts", (tokens, tokens / sharding.sp), inner)


def mlp_work(
    sharding: Sharding, part: str, rows: float, inner: float, trained: bool, weights: float = 1.0
) -> Iterator[Product]:
    """Both products of an MLP. `inner`: FFN width on this rank; `weights`: local experts that share the rows."""
    width, gated = sharding.backbone.hidden_size, 2 if sharding.backbone.gated_linear_unit else 1
    for shape in ((width, gated * inner), (inner, width)):
        yield Product(part=part, rows=rows, inner=shape[0], columns=shape[1], weights=weights, weight_gradient=trained)


def mlp_adapter_work(
    sharding: Sharding, part: str, role: str, rows: tuple[float, float], inner: float, weights: float = 1.0
) -> Iterator[Product]:
    """The adapters of an MLP over `rows`: inside it, and where sequence parallelism splits the positions."""
    width, gated = sharding.backbone.hidden_size, 2 if sharding.backbone.gated_linear_unit else 1
    inside, split = rows
    yield from adapter_work(sharding, part, role, (split, width, gated), (inside, gated * inner), weights)
    yield from adapter_work(sharding, part, role, (inside, inner, 1), (split, width), weights)


def adapter_work(
    sharding: Sharding,
    part: str,
    role: str,
    a: tuple[float, float, int],
    b: tuple[float, float],
    weights: float = 1.0,
) -> Iterator[Product]:
    """A x and B A x of one matrix of the decoder, if its role is adapted. `a`: rows, inputs, projections; `b`: rows, outputs.

    Those of the router, the projector and the tower are left out.
    """
    if sharding.lora is None or role not in adapted_roles(sharding.lora):
        return
    rank = sharding.lora.rank
    for rows, inner, columns in ((a[0], a[1], a[2] * rank), (b[0], rank, b[1])):
        yield Product(part=part, rows=rows, inner=inner, columns=columns, weights=weights, weight_gradient=True)


def first_stage_work(
    sharding: Sharding, images: float, reach: float | None = None, apart: Sequence[float] | None = None
) -> Iterator[Work]:
    """Towers and projectors over `images`, and over those of each modality that is apart (`apart`; None: as many of each).
    `reach` as in `tower_layers_work`."""
    for tower, count, reached in ways(sharding, images, reach, apart):
        yield from _way_work(sharding, tower, count, reached)


def ways(
    sharding: Sharding, images: float, reach: float | None = None, apart: Sequence[float] | None = None
) -> Iterator[tuple[Tower, float, float | None]]:
    """(tower, images, reach) of plain pictures and of each modality that is apart."""
    yield sharding.tower, images, reach
    counts = [images] * len(sharding.branches) if apart is None else apart
    for branch, count in zip(sharding.branches, counts, strict=True):
        yield branch.seen_by(sharding.tower), count, None


def _way_work(sharding: Sharding, tower: Tower, images: float, reach: float | None) -> Iterator[Work]:
    hidden = sharding.backbone.hidden_size
    yield Product(
        part="tower",
        rows=images * tower.num_patches,
        inner=3 * tower.patch_size**2,
        columns=tower.hidden_size,
        input_gradient=False,
        weight_gradient="tower" in sharding.trains,
        copies=sharding.tp,
    )
    yield from tower_layers_work(sharding, images, reach, tower)
    visual, projects = images * tower.num_features, "projector" in sharding.trains
    sizes, mixture = (tower.projector_input_size, hidden, hidden), sharding.run.mixtures.get("projector")
    if mixture is not None:
        yield from vision_moe_work(sharding, "projector", visual, sizes, mixture)
        return
    # Megatron-Core's linear layer computes the gradient of the frozen tower's features too.
    yield linear("projector", visual, tower.projector_input_size, hidden / sharding.tp, projects)
    yield linear("projector", visual, hidden / sharding.tp, hidden, projects)


def vision_moe_work(
    sharding: Sharding, part: str, rows: float, sizes: tuple[int, int, int], mixture: MoEConfig, times: int = 1
) -> Iterator[Product]:
    """Router and experts (balanced) of `times` MoE layers of the tower or the projector (`part`). `sizes`: inputs, inner and
    output columns of an expert. Tensor-parallel ranks divide the tokens."""
    own, local = rows / sharding.tp, mixture.num_moe_experts / sharding.ep
    gradient, trained = part == "projector" or part in sharding.backpropagates, part in sharding.trains
    inputs, inner, outputs = sizes
    products = [(own, inputs, mixture.num_moe_experts, 1.0)]
    products += [(own * mixture.moe_router_topk, *shape, local) for shape in ((inputs, inner), (inner, outputs))]
    for tokens, columns_in, columns_out, weights in products:
        yield Product(
            part=part,
            rows=tokens,
            inner=columns_in,
            columns=columns_out,
            times=times,
            weights=weights,
            input_gradient=gradient,
            weight_gradient=trained,
        )


def tower_layers_work(
    sharding: Sharding, images: float, reach: float | None = None, tower: Tower | None = None
) -> Iterator[Work]:
    """The transformer layers of a tower (None: the model's) that features need. `reach`: rows that a row attends to; None:
    those of the largest picture."""
    tower, tp, trained = tower or sharding.tower, sharding.tp, "tower" in sharding.backpropagates
    rows, width, inner, layers = (
        images * tower.num_rows,
        tower.hidden_size,
        tower.ffn_hidden_size,
        tower.num_used_layers,
    )
    mixture, sparse = sharding.run.mixtures.get("tower"), len(sharding.model.tower_moe_layers)
    if mixture is not None:
        yield from vision_moe_work(sharding, "tower", rows, (width, inner, width), mixture, sparse)
    attentions = layers * (2 if tower.takes_videos else 1)
    for inputs, outputs, times in (
        (width, 3 * width / tp, attentions),
        (width / tp, width, attentions),
        (width, inner / tp, layers - sparse),
        (inner / tp, width, layers - sparse),
    ):
        yield Product(
            part="tower",
            rows=rows,
            inner=inputs,
            columns=outputs,
            times=times,
            input_gradient=trained,
            weight_gradient="tower" in sharding.trains,
        )
    lengths = [tower.num_rows if reach is None else reach] + [float(tower.num_frames)] * tower.takes_videos
    for length in lengths:
        yield from [
            Attention(rows=rows, length=length, width=width / tp, causal=False, with_backward=trained, part="tower")
        ] * layers


def last_stage_work(sharding: Sharding, tokens: float) -> Iterator[Work]:
    """The output layer over every position, image tokens included, as Megatron-Core computes it."""
    columns = sharding.vocabulary / sharding.tp
    yield linear("output", tokens, sharding.backbone.hidden_size, columns, "language.embedding" in sharding.trains)


def forward_flops(work: Work, causal: float = CAUSAL) -> float:
    """Of a forward pass whose attention computes the share `causal` of the scores that a causal mask leaves."""
    return work.forward * (causal if isinstance(work, Attention) and work.causal else 1.0)


def useful_flops(work: Work, causal: float = CAUSAL) -> float:
    """Forward and backward, without what is computed twice: a flash kernel's backward pass makes the scores again."""
    if isinstance(work, Product):
        return work.forward + work.backward
    filled = 1.0 if work.value_width is None else (work.width + work.value_width) / (2 * work.width)
    return forward_flops(work, causal) * (3 if work.with_backward else 1) * filled
