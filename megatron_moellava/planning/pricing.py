"""Time of a step and cost of a stage: products at a share of the peak, bytes at a share of a bandwidth.

A prediction of ours, not a measurement. A micro-batch on one pipeline rank costs
  max(GPU time, host time to launch its kernels) + what its communication leaves exposed,
a step the pipeline's slowest rank over all micro-batches + the bubble + gradients, optimizer, parameters.
"""

from collections import Counter
from dataclasses import dataclass

from megatron_moellava.costs.exchange import vision_exchanges
from megatron_moellava.costs.flops import CAUSAL, Attention, Work
from megatron_moellava.costs.gpus import Gpu
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import OF_EXPERTS, parameters_of, role_of
from megatron_moellava.costs.sharding import routed_tokens
from megatron_moellava.costs.stage_work import Load, model_flops, recomputed_work, stage_work
from megatron_moellava.planning.activations import layer_bytes, layer_parts, part_bytes
from megatron_moellava.planning.hardware import CALIBRATION, Efficiency
from megatron_moellava.planning.memory import state_bytes

GROUPED = ("experts",)
FP8_PARTS = ("attention", "ffn", "experts", "shared experts")  # router, logits, projector and tower stay in bf16
# Element-wise kernels move every kept byte about so often: written and read once forwards; read, and its gradient
# written and read, backwards. Products read theirs besides (flops.py).
MOVES_FORWARD, MOVES_BACKWARD = 2, 3
# Kernel launches of a layer, forward and backward, counted from the operations of Megatron-Core's layers.
LAUNCHES = {False: (30, 60), True: (75, 130)}
OPTIMIZER_BYTES = 30  # per trained parameter of this rank's share: gradient and three states read, four written
HIDDEN = 0.9  # share of an overlapped collective that computation hides: the last bucket of each way has none beside it
BACKWARD = 2 / 3  # share of a micro-batch's computation


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Seconds of one optimizer step on the slowest rank, and what follows for the stage."""

    step_seconds: float
    compute_seconds: float
    tensor_seconds: float  # exposed communication, by axis
    expert_seconds: float
    pipeline_seconds: float
    data_seconds: float
    optimizer_seconds: float
    bubble: float  # share of the step
    mfu: float
    samples_per_step: float
    tokens_per_second: float  # whole job, padding included
    steps: int = 0
    hours: float = 0.0
    gpu_hours: float = 0.0

    @property
    def communication_seconds(self) -> float:
        """Exposed communication of all axes, per step."""
        return self.tensor_seconds + self.expert_seconds + self.pipeline_seconds + self.data_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTime:
    """Seconds of one micro-batch on one pipeline rank."""

    compute: float
    tensor: float
    expert: float

    @property
    def total(self) -> float:
        """Computation and exposed communication together."""
        return self.compute + self.tensor + self.expert


@dataclass(frozen=True, kw_only=True, slots=True)
class Pricing:
    """Everything a price depends on beside the layout."""

    gpu: Gpu
    efficiency: Efficiency = CALIBRATION
    imbalance: float = 1.0  # busiest expert rank over the mean, on average
    fp8: bool = False

    @property
    def peak(self) -> float:
        """FLOP/s of the GPU in the precision of the products."""
        return self.gpu.peak(self.fp8)

    @property
    def memory_rate(self) -> float:
        """Bytes per second that element-wise kernels reach."""
        return self.gpu.memory_bandwidth * self.efficiency.memory

    def link(self, span: int) -> float:
        """Bytes per second and GPU within a group whose ranks lie `span` apart in all."""
        if span <= self.gpu.gpus_per_node:
            return self.gpu.nvlink_bandwidth * self.efficiency.nvlink
        return self.gpu.network_bandwidth * self.efficiency.network


def costs_of(layout: Layout, pricing: Pricing, load: Load, samples: int = 0) -> Costs:
    """Prediction for one step, and for `samples` of training data."""
    ranks = [rank_time(layout, rank, pricing, load) for rank in range(layout.pp)]
    slowest = max(ranks, key=lambda item: item.total)
    micro_batches = layout.micro_batches
    pipeline = _pipeline_seconds(layout, pricing, load) * micro_batches
    busy = micro_batches * slowest.total
    idle = (sum(item.total for item in ranks) - slowest.total) / layout.vp
    data = data_seconds(layout, pricing, slowest.compute)
    optimizer = _optimizer_seconds(layout, pricing)
    step = busy + idle + pipeline + data + optimizer
    rows = micro_batches * layout.dp
    flops = model_flops(layout, load) * rows
    steps = -(-samples // round(rows * load.samples)) if samples else 0
    return Costs(
        step_seconds=step,
        compute_seconds=micro_batches * slowest.compute,
        tensor_seconds=micro_batches * slowest.tensor,
        expert_seconds=micro_batches * slowest.expert,
        pipeline_seconds=pipeline,
        data_seconds=data,
        optimizer_seconds=optimizer,
        bubble=idle / step,
        mfu=flops / (step * layout.world_size * pricing.peak),
        samples_per_step=rows * load.samples,
        tokens_per_second=rows * load.tokens / step,
        steps=steps,
        hours=steps * step / 3600,
        gpu_hours=steps * step / 3600 * layout.world_size,
    )


# --- one micro-batch on one rank --------------------------------------------------------------------------------------


def rank_time(layout: Layout, pipeline_rank: int, pricing: Pricing, load: Load) -> RankTime:
    """Seconds of one micro-batch with `load` on one pipeline rank, exposed communication included."""
    work = list(stage_work(layout, pipeline_rank, load.tokens, load.length, *load.pictures))
    products = sum(work_seconds(item, pricing) for item in work)
    share = load.tokens / layout.tokens
    elementwise = _elementwise_bytes(layout, pipeline_rank) * share * (MOVES_FORWARD + MOVES_BACKWARD)
    again = _recomputation_seconds(layout, pipeline_rank, pricing, load)
    gpu = products + elementwise / pricing.memory_rate + again
    compute = max(gpu, _launches(layout, pipeline_rank) * pricing.efficiency.launch_seconds)
    return RankTime(
        compute=compute,
        tensor=_tensor_seconds(layout, pipeline_rank, pricing, load),
        expert=_expert_seconds(layout, pipeline_rank, pricing, load)
        + (_vision_expert_seconds(layout, pricing, load) if pipeline_rank == 0 else 0.0),
    )


def work_seconds(work: Work, pricing: Pricing, forward_only: bool = False) -> float:
    """Of a product or of attention, forward and backward."""
    if isinstance(work, Attention):
        flops = (work.forward + (0.0 if forward_only else work.backward)) * (CAUSAL if work.causal else 1.0)
        return flops / (pricing.gpu.peak_bf16 * pricing.efficiency.attention)
    grouped = work.part in GROUPED
    peak = pricing.peak if work.part in FP8_PARTS else pricing.gpu.peak_bf16
    rate = peak * (pricing.efficiency.grouped_matmul if grouped else pricing.efficiency.matmul)
    once = max(work.forward / rate, work.forward_bytes / pricing.memory_rate)
    passes = 1 if forward_only else 1 + int(work.input_gradient) + int(work.weight_gradient)
    return once * passes * (pricing.imbalance if grouped else 1.0)


def _elementwise_bytes(layout: Layout, pipeline_rank: int) -> float:
    """What autograd would keep without recomputation is what element-wise kernels move."""
    bytes_of = part_bytes(layout, "te")
    total = 0.0
    for is_moe, count in Counter(layout.kinds_of(pipeline_rank)).items():
        total += count * sum(bytes_of.get(part, 0.0) for part in layer_parts(layout, is_moe))
    return total + (bytes_of["end"] if pipeline_rank == layout.pp - 1 else 0.0)


def _recomputation_seconds(layout: Layout, pipeline_rank: int, pricing: Pricing, load: Load) -> float:
    work = recomputed_work(layout, pipeline_rank, load.tokens, load.length, *load.pictures)
    seconds = sum(work_seconds(item, pricing, forward_only=True) for item in work)
    bytes_of, kinds = part_bytes(layout, "te"), layout.kinds_of(pipeline_rank)
    dropped = sum(layer_bytes(layout, bytes_of, is_moe)[1] * count for is_moe, count in Counter(kinds).items())
    return seconds + dropped * load.tokens / layout.tokens * MOVES_FORWARD / pricing.memory_rate


def _launches(layout: Layout, pipeline_rank: int) -> int:
    layers = layout.kinds_of(pipeline_rank)
    forward = sum(LAUNCHES[is_moe][0] for is_moe in layers)
    backward = sum(LAUNCHES[is_moe][1] for is_moe in layers)
    return forward * (2 if layout.run.training.recompute == "full" else 1) + backward


def _passes(layout: Layout) -> int:
    """Forward, backward, and the forward pass that full recomputation repeats."""
    return 3 if layout.run.training.recompute == "full" else 2


def _tensor_seconds(layout: Layout, pipeline_rank: int, pricing: Pricing, load: Load) -> float:
    """All-gather and reduce-scatter around attention and around a dense FFN; experts work on split positions."""
    if layout.tp == 1:
        return 0.0
    bytes_moved = load.tokens * layout.backbone.hidden_size * 2 * (layout.tp - 1) / layout.tp
    collectives = sum(2 if is_moe else 4 for is_moe in layout.kinds_of(pipeline_rank))
    trained = {"language.attention", "language.ffn"} & set(layout.trains)
    gathered_again = 0.5 if trained else 0.0  # weight gradients need the gathered input once more
    return collectives * (_passes(layout) + gathered_again) * bytes_moved / pricing.link(layout.tp)


def _expert_seconds(layout: Layout, pipeline_rank: int, pricing: Pricing, load: Load) -> float:
    """Dispatch and combine, forwards and backwards, not overlapped with anything."""
    if layout.run.moe is None or layout.ep * layout.etp == 1:
        return 0.0
    group = layout.ep * layout.etp
    rows = routed_tokens(layout) * load.tokens / layout.tokens
    bytes_moved = rows * layout.backbone.hidden_size * 2 * pricing.imbalance
    passes = 3 if layout.run.training.recompute in ("full", "moe") else 2
    return sum(layout.kinds_of(pipeline_rank)) * 2 * passes * _exchange_seconds(bytes_moved, group, pricing)


def _vision_expert_seconds(layout: Layout, pricing: Pricing, load: Load) -> float:
    """The same for the experts of tower and projector, which are whole; those of a recomputed tower get their rows twice."""
    if layout.ep == 1:
        return 0.0
    element, bytes_moved = layout.activation_bytes, 0.0
    for exchange in vision_exchanges(layout, *load.pictures):
        again = exchange.part == "tower" and exchange.to_outputs and layout.run.training.recompute_tower
        bytes_moved += exchange.forward(element) * (2 if again else 1) + exchange.backward(element)
    return _exchange_seconds(bytes_moved * pricing.imbalance, layout.ep, pricing)


def _exchange_seconds(bytes_moved: float, group: int, pricing: Pricing) -> float:
    """All-to-all of `bytes_moved` of each rank, those for itself included: to ranks of the node and beyond at once."""
    near = min(group, pricing.gpu.gpus_per_node)
    inside = bytes_moved * (near - 1) / group / pricing.link(near)
    outside = bytes_moved * (group - near) / group / pricing.link(group) if group > near else 0.0
    return max(inside, outside)


def _pipeline_seconds(layout: Layout, pricing: Pricing, load: Load) -> float:
    """Hidden states to the next stage and gradients back, for one micro-batch; stages are usually on other nodes."""
    if layout.pp == 1:
        return 0.0
    bytes_moved = load.tokens * layout.backbone.hidden_size * 2 / layout.sp
    return 2 * layout.vp * bytes_moved / pricing.link(layout.world_size)


# --- once a step ------------------------------------------------------------------------------------------------------


def data_seconds(layout: Layout, pricing: Pricing, compute: float) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of parameters, of the rank that trains most.

    Overlapped, they run beside the last backward and the first forward pass of a step; a micro-batch computes `compute`.
    """
    hides_reduce, hides_gather = layout.run.optimizer.overlaps(pays=layout.dp > 1)
    per_byte = max(_seconds_per_byte(layout, rank, pricing) for rank in range(layout.pp))
    reduce = _exposed(4 * per_byte, hides_reduce, BACKWARD * compute)
    return reduce + _exposed(layout.activation_bytes * per_byte, hides_gather, (1 - BACKWARD) * compute)


def _exposed(seconds: float, hides: bool, beside: float) -> float:
    return max(seconds * (1 - HIDDEN), seconds - beside) if hides else seconds


def _seconds_per_byte(layout: Layout, pipeline_rank: int, pricing: Pricing) -> float:
    """Of a collective over all that one rank trains, for one byte of each parameter."""
    seconds = 0.0
    for part, count in parameters_of(layout, pipeline_rank).items():
        if role_of(part) in layout.trains:
            is_expert = part in OF_EXPERTS
            group = layout.expert_dp if is_expert else layout.dp
            inner = layout.ep * layout.etp if is_expert else layout.tp
            seconds += count * (group - 1) / group / _ring(pricing, inner, group)
    return seconds


def _ring(pricing: Pricing, inner: int, group: int) -> float:
    """Rate of a collective over `group` ranks that lie `inner` apart: all of a node's members share its network ports."""
    if inner * group <= pricing.gpu.gpus_per_node:
        return pricing.link(inner * group)
    members = max(pricing.gpu.gpus_per_node // inner, 1)
    return min(pricing.link(inner * group) * members, pricing.link(1))


def _optimizer_seconds(layout: Layout, pricing: Pricing) -> float:
    states = max(state_bytes(layout, rank)[2] for rank in range(layout.pp))
    return states / 12 * OPTIMIZER_BYTES / pricing.memory_rate
