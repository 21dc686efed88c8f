"""Memory of one rank: what must be resident, what a step adds at its peak, and a margin for what no formula knows.

Parts of the prediction, in bytes:
  weights      in the run's precision, frozen ones included; the router in fp32
  gradients    fp32 buffers of what is trained
  optimizer    fp32 copy, two moments, and an average of the weights where the run keeps one, shared among the data-parallel
               ranks (of experts: their own, fewer)
  activations  what autograd keeps for all micro-batches in flight
  working      the largest of: one layer's backward pass with what it recomputes, the logits, the vision tower
  dispatch     send and receive buffers of the experts' tokens
  margin       the tokens that the busiest expert rank gets beyond the mean, fragmentation, the CUDA context
"""

from dataclasses import asdict, dataclass, replace

from megatron_moellava.costs.flops import ways
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import FP32_PARTS, OF_EXPERTS, parameters_of, role_of
from megatron_moellava.costs.sharding import routed_tokens
from megatron_moellava.planning.activations import Activations, activations_of, sizes, tower_layer_elements
from megatron_moellava.planning.hardware import CONTEXT_BYTES, FRAGMENTATION, IMBALANCE

FP32 = 4
ADAM_MOMENTS = 2 * FP32
ADAM_ONLY = (
    "language.embedding",
    "language.norm",
)  # Muon steps matrices; what few vectors other parts have are not counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    dispatch: float
    margin: float

    @property
    def total(self) -> float:
        """Bytes of all parts together, the margin included."""
        return sum(asdict(self).values())


def memory_of(layout: Layout, pipeline_rank: int, modules: str = "te", imbalance: float = IMBALANCE) -> Memory:
    """Prediction for any rank of a pipeline stage."""
    balanced = _balanced_memory(layout, pipeline_rank, modules, 1.0)
    skewed = _balanced_memory(layout, pipeline_rank, modules, imbalance if layout.run.moe else 1.0)
    excess = skewed.total - balanced.total
    return replace(balanced, margin=excess + FRAGMENTATION * skewed.total + CONTEXT_BYTES)


def worst_memory(layout: Layout, modules: str = "te", imbalance: float = IMBALANCE) -> Memory:
    """Of the pipeline stage that needs most."""
    return max((memory_of(layout, rank, modules, imbalance) for rank in range(layout.pp)), key=lambda item: item.total)


def state_bytes(layout: Layout, pipeline_rank: int) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) of one rank: what does not depend on the batch."""
    weights = gradients = optimizer = 0.0
    for part, count in parameters_of(layout, pipeline_rank).items():
        is_fp32 = part in FP32_PARTS or layout.run.training.precision == "fp32"
        weights += count * (FP32 if is_fp32 else layout.activation_bytes)
        if role_of(part) not in layout.trains:
            continue
        gradients += count * FP32
        shards = layout.expert_dp if part in OF_EXPERTS else layout.dp
        # fp32 parameters are their own main copy.
        has_momentum = layout.run.optimizer.optimizer == "muon" and part not in ADAM_ONLY
        moments = FP32 if has_momentum else ADAM_MOMENTS
        average = 0 if layout.run.optimizer.ema_decay is None else FP32
        optimizer += count * (moments + average + (0 if is_fp32 else FP32)) / shards
    return weights, gradients, optimizer


def _balanced_memory(layout: Layout, pipeline_rank: int, modules: str, imbalance: float) -> Memory:
    weights, gradients, optimizer = state_bytes(layout, pipeline_rank)
    kept = activations_of(layout, pipeline_rank, modules, imbalance)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept.peak(layout.in_flight(pipeline_rank)),
        working=working_bytes(layout, pipeline_rank, kept),
        dispatch=dispatch_bytes(layout, imbalance),
        margin=0.0,
    )


def working_bytes(layout: Layout, pipeline_rank: int, kept: Activations) -> float:
    """The largest short-lived set beyond what is kept at the end of a forward pass.

    Either the logits before the loss; or the tower, which runs before its micro-batch keeps anything; or one layer's
    backward pass with what it recomputes and its gradients, when the layers behind it need nothing any more.
    """
    elements, width = sizes(layout), layout.activation_bytes
    worst = elements["logits"] * width if pipeline_rank == layout.pp - 1 else 0.0
    if pipeline_rank == 0:
        is_moe = bool(layout.model.tower_moe_layers)
        largest = max(tower_layer_elements(layout, tower, is_moe) for tower, *_ in ways(layout, layout.images))
        worst = max(worst, largest * width - kept.chunks[0])
    gradients = {is_moe: gradient_elements(layout, is_moe) * width for is_moe in set(layout.kinds_of(pipeline_rank))}
    # Measured: without a pipeline what the loss keeps is let go of only after the last layer's backward pass.
    holds_loss = layout.pp == 1
    for number, kinds in enumerate(layout.chunk_kinds(pipeline_rank)):
        end = kept.end if number == layout.vp - 1 else 0.0
        freed = 0.0 if holds_loss else end
        for layer in reversed(range(len(kinds))):
            own, again = kept.layers[number][layer]
            worst = max(worst, again + gradients[kinds[layer]] - freed)
            freed += own + (end if holds_loss and layer == len(kinds) - 1 else 0.0)
    return worst


def gradient_elements(layout: Layout, is_moe: bool) -> float:
    """Gradients that one layer's backward pass holds at once: before and after fc1, of its input, and of its weight."""
    elements, backbone = sizes(layout), layout.backbone
    if not is_moe:
        inner, columns, is_trained = elements["inner_in"], elements["inner_in"] / layout.tokens, "language.ffn"
    else:
        inner, columns, is_trained = elements["expert_inner_in"], elements["expert_columns"], "experts"
    weight = backbone.hidden_size * columns if is_trained in layout.trains else 0.0
    return 1.5 * inner + 2 * elements["hidden"] + weight


def dispatch_bytes(layout: Layout, imbalance: float = 1.0) -> float:
    """Permuted tokens, what the all-to-all receives, and the same on the way back, of one layer.

    Counted even where the peak is elsewhere: a caching allocator keeps buffers of such sizes.
    """
    if not layout.run.moe:
        return 0.0
    sent = routed_tokens(layout) / layout.etp * layout.backbone.hidden_size
    received = routed_tokens(layout, imbalance) * layout.backbone.hidden_size
    return 2 * (sent + received) * layout.activation_bytes
