"""How many parameters a model has, by role, whole or on one rank: sums over the tensors of `shapes.py`.

Experts are reduced over fewer ranks than the rest, so what every expert rank has whole stays apart from them.
"""

import math
from collections import Counter
from collections.abc import Iterator

from megatron_moellava.config import MoEConfig, ProjectorMoEConfig
from megatron_moellava.costs.adapters import adapters_beside
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.shapes import (
    LANGUAGE,
    Model,
    ModelTensor,
    Tensors,
    branch_tensors,
    embedding_tensors,
    layer_tensors,
    model_tensors,
    output_tensors,
    projector_tensors,
    tower_layer_tensors,
    tower_stem_tensors,
)
from megatron_moellava.stages import ADAPTERS

SHARED = "shared experts"  # of role `experts`, but whole on every expert rank and reduced like the dense layers
EXPERT_ADAPTERS = "experts' adapters"  # of role `adapters`, reduced like the experts
VISION_EXPERTS = {
    "tower": "tower's experts",
    "projector": "projector's experts",
}  # of these roles, reduced like the experts
VISION_ROUTERS = {"tower": "tower's routers", "projector": "projector's router"}  # of these roles, in fp32
# Divided among expert-parallel ranks.
OF_EXPERTS = ("experts", EXPERT_ADAPTERS, *VISION_EXPERTS.values())
# Sums over the parts of a rank (bytes, seconds) are made in this order, so that they do not depend on shapes.py's.
PARTS = (
    "tower",
    "projector",
    "language.embedding",
    "language.attention",
    "language.norm",
    "experts",
    "router",
    "language.ffn",
    SHARED,
    ADAPTERS,
    EXPERT_ADAPTERS,
    *VISION_EXPERTS.values(),
    *VISION_ROUTERS.values(),
)
FP32_PARTS = ("router", *VISION_ROUTERS.values())  # kept in fp32 whatever the run's precision
ROLES_OF_PARTS = {SHARED: "experts", EXPERT_ADAPTERS: ADAPTERS} | {
    part: role for parts in (VISION_EXPERTS, VISION_ROUTERS) for role, part in parts.items()
}


def role_of(part: str) -> str:
    """The training role of a key of `parameters_of`."""
    return ROLES_OF_PARTS.get(part, part)


def whole_parameters(model: Model) -> Counter:
    """role -> parameters of the whole model."""
    count: Counter = Counter()
    for tensor in model_tensors(model).values():
        count[tensor.role] += tensor.size if tensor.is_parameter else 0
    return count


def activated_parameters(model: Model) -> Counter:
    """role -> parameters that one token passes through: of the routed experts, top-k."""
    count = whole_parameters(model)
    for tensor in model_tensors(model).values():
        if tensor.is_expert:
            moe = mixture_of_role(model, tensor.role)
            count[tensor.role] -= tensor.size // moe.num_moe_experts * (moe.num_moe_experts - moe.moe_router_topk)
    return count


def mixture_of_role(model: Model, role: str) -> MoEConfig | ProjectorMoEConfig:
    """The numbers of the experts whose tensors have this role."""
    moe = {"tower": model.tower_moe, "projector": model.projector_moe}.get(role, model.moe)
    assert moe is not None
    return moe


def token_flops(model: Model) -> int:
    """FLOPs of one token's forward pass through the matrices of the language model: a multiplication and an addition for each
    activated weight. Attention's scores, which grow with the row, are not in it."""
    tied, flops = model.backbone.share_embeddings_and_output_weights, 0
    for name, tensor in model_tensors(model).items():
        is_matrix = name.endswith("weight") and len(tensor.shape) - tensor.is_expert == 2
        looked_up = name.endswith("word_embeddings.weight") and not tied
        if name.startswith(LANGUAGE) and is_matrix and not looked_up:
            moe = model.required_moe if tensor.is_expert else None
            flops += 2 * (tensor.size // moe.num_moe_experts * moe.moe_router_topk if moe else tensor.size)
    return flops


def parameters_of(layout: Layout, pipeline_rank: int) -> Counter:
    """role, or SHARED -> parameters of this pipeline rank (of any of its tensor, expert and data ranks)."""
    count: Counter = Counter()
    for times, tensors in _held(layout, pipeline_rank):
        own: Counter = Counter()
        tensors = tensors | adapters_beside(layout.model, layout.lora, tensors)
        for name, tensor in tensors.items():
            own[_part(name, tensor)] += elements_on_rank(layout, tensor) if tensor.is_parameter else 0
        for part in sorted(own, key=PARTS.index):
            count[part] += times * own[part]
    return count


def _part(name: str, tensor: ModelTensor) -> str:
    if tensor.role in VISION_EXPERTS and tensor.is_expert:
        return VISION_EXPERTS[tensor.role]
    if tensor.role in VISION_ROUTERS and name.endswith("router.weight"):
        return VISION_ROUTERS[tensor.role]
    if tensor.role == ADAPTERS:
        return EXPERT_ADAPTERS if tensor.is_expert else ADAPTERS
    return SHARED if tensor.role == "experts" and not tensor.is_expert else tensor.role


def elements_on_rank(layout: Layout, tensor: ModelTensor) -> int:
    """Of one tensor; a vocabulary that does not divide is padded, so that every rank has equally many rows."""
    shape, ranks = list(tensor.shape), layout.etp if tensor.is_expert else layout.tp
    if tensor.split is not None:
        shape[tensor.split] = -(-shape[tensor.split] // ranks)
    if tensor.is_expert:
        shape[0] //= layout.ep
    return math.prod(shape)


def _held(layout: Layout, pipeline_rank: int) -> Iterator[tuple[int, Tensors]]:
    """(how often, tensors) of everything that a pipeline rank holds: layers of one kind are counted once."""
    model = layout.model
    if pipeline_rank == 0:
        yield 1, tower_stem_tensors(layout.tower)
        routed = len(model.tower_moe_layers)
        yield layout.tower.num_used_layers - routed, tower_layer_tensors(layout.tower)
        if routed:
            yield routed, tower_layer_tensors(layout.tower, model.tower_moe)
        yield 1, projector_tensors(model.backbone, layout.tower, model.projector_moe)
        for branch in model.branches:
            yield 1, branch_tensors(model, branch)
        yield 1, embedding_tensors(model.backbone)
    for is_moe, layers in Counter(layout.kinds_of(pipeline_rank)).items():
        yield layers, layer_tensors(model, is_moe)
    if pipeline_rank == layout.pp - 1:
        yield 1, output_tensors(model.backbone)
        if model.backbone.share_embeddings_and_output_weights and layout.pp > 1:
            yield 1, embedding_tensors(model.backbone)  # the pipeline separates the two ends: each has a copy
