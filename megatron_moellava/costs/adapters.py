"""Which matrices get low-rank adapters, and the shapes of these: read off the list of a model's tensors.

A matrix W [O, I] that holds several projections (q, k and v; gate and up) gets an adapter for each: `a` [P r, I] has their
A's below each other, and there is a `b` [o, r] for each of them. Experts have one more axis in front. Rows of a `b` are in
the order of the projection alone (that of `peft` and Hugging Face), not in that of Megatron's fused matrix.
"""

from dataclasses import dataclass

from megatron_moellava.config import LoraConfig
from megatron_moellava.costs.shapes import TOWER, Model, ModelTensor, Tensors, model_tensors
from megatron_moellava.mapping import Heads
from megatron_moellava.stages import ADAPTERS, TARGETS, USUAL_TARGETS

PREFIX = f"{ADAPTERS}."  # of the tensors in a checkpoint: adapters.{name of the matrix}.a
MATRICES = tuple(
    f"{name}.weight"
    for name in (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
        "router",
        # of multi-latent attention
        "linear_q_proj",
        "linear_q_down_proj",
        "linear_q_up_proj",
        "linear_kv_down_proj",
        "linear_kv_up_proj",
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """One matrix and the projections that it holds."""

    name: str  # of the matrix, without ".weight"
    role: str
    parts: tuple[
        tuple[str, int], ...
    ]  # (projection, rows), e.g. (("q", 64), ("k", 32), ("v", 32)); of one: (("", rows),)
    columns: int
    split: int | None  # axis divided among tensor-parallel ranks, of one expert's matrix
    experts: int = 0  # of the layer; 0: no routed experts
    heads: Heads | None = None  # of a matrix of q, k and v

    def tensors(self, lora: LoraConfig) -> Tensors:
        """The adapter's tensors: {"a": ..., "b_q": ...}."""
        own = {"a": ModelTensor((len(self.parts) * lora.rank, self.columns), ADAPTERS, 1 if self.split == 1 else None)}
        for part, rows in self.parts:
            own[b_name(part)] = ModelTensor((rows, lora.rank), ADAPTERS, 0 if self.split == 0 else None)
        return {key: tensor if self.is_shared(key, lora) else self._of_experts(tensor) for key, tensor in own.items()}

    def is_shared(self, key: str, lora: LoraConfig) -> bool:
        """Whether all experts of the layer have this tensor in common."""
        return lora.shared_outer and (self.split == 0) == (key == "a")

    def _of_experts(self, tensor: ModelTensor) -> ModelTensor:
        if not self.experts:
            return tensor
        split = None if tensor.split is None else tensor.split + 1
        return ModelTensor((self.experts, *tensor.shape), ADAPTERS, split, is_expert=True)


def b_name(part: str) -> str:
    """ "q" -> "b_q": the tensor of a projection's B."""
    return f"b_{part}" if part else "b"


def adapted_matrices(model: Model, lora: LoraConfig) -> list[Adapted]:
    """Every matrix of a whole model that gets an adapter, in the order of the model."""
    return _adapted(model, lora, model_tensors(model))


def adapter_tensors(model: Model, lora: LoraConfig | None) -> Tensors:
    """Every tensor of the adapters by its name in a checkpoint."""
    return adapters_beside(model, lora, model_tensors(model)) if lora else {}


def adapters_beside(model: Model, lora: LoraConfig | None, tensors: Tensors) -> Tensors:
    """The adapters of some of a model's `tensors` (a layer's, say)."""
    if lora is None:
        return {}
    return {
        f"{PREFIX}{item.name}.{key}": tensor
        for item in _adapted(model, lora, tensors)
        for key, tensor in item.tensors(lora).items()
    }


def targets_without_a_matrix(model: Model, lora: LoraConfig) -> list[str]:
    """Targets that match nothing in this model."""
    found = {item.role for item in adapted_matrices(model, lora)}
    return [target for target in lora.targets or () if TARGETS[target] not in found]


def _adapted(model: Model, lora: LoraConfig, tensors: Tensors) -> list[Adapted]:
    roles = {TARGETS[target] for target in lora.targets or USUAL_TARGETS}
    found = []
    for name, tensor in tensors.items():
        if tensor.role in roles and name.endswith(MATRICES):
            experts = tensor.shape[0] if tensor.is_expert else 0
            *_, rows, columns = tensor.shape
            split = None if tensor.split is None else tensor.split - int(tensor.is_expert)
            heads = _heads(model, name, tensor.role)
            found.append(
                Adapted(
                    name=name.removesuffix(".weight"),
                    role=tensor.role,
                    parts=_parts(model, name, tensor.role, rows, heads),
                    columns=columns,
                    split=split,
                    experts=experts,
                    heads=heads,
                )
            )
    return found


def _heads(model: Model, name: str, role: str) -> Heads | None:
    if not name.endswith("linear_qkv.weight"):
        return None
    return model.tower_of(name).heads if role == "tower" or name.startswith(TOWER) else model.backbone.heads


def _parts(model: Model, name: str, role: str, rows: int, heads: Heads | None) -> tuple[tuple[str, int], ...]:
    if heads is not None:
        key = heads.num_query_groups * heads.kv_channels
        return ("q", heads.num_attention_heads * heads.kv_channels), ("k", key), ("v", key)
    is_gated = model.backbone.gated_linear_unit and role not in ("tower", "projector")
    if name.endswith("linear_fc1.weight") and is_gated:
        return ("gate", rows // 2), ("up", rows // 2)
    return (("", rows),)
