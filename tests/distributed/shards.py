"""Whole tensors by name <-> the shards of a layout, without megatron-core's checkpoints.

Initial weights are drawn per whole tensor and cut here; gradients and parameters are put together here. A checkpoint
that errs in the same way on saving and loading could therefore not hide.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.training.optimizer import distributed_optimizers

from megatron.core import parallel_state
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

LOCAL_EXPERT = (
    re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.(weight|bias)$"),  # sequential
    re.compile(r"\.experts\.()(linear_fc\d)\.(weight|bias)(\d+)$"),  # grouped
)


@dataclass(frozen=True, slots=True)
class Shard:
    """Where a local tensor sits in the whole one."""

    axis: int | None  # None: whole
    rank: int
    size: int
    gated: bool  # rows are [gate; up], each cut by itself
    rows: int | None  # of the unpadded vocabulary
    experts: tuple[int, int] = (0, 1)  # (rank, size) of what divides the first axis: experts that lie in one tensor

    @property
    def place(self) -> tuple[int, int]:
        return self.experts[0], self.rank

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        whole = whole.chunk(self.experts[1], 0)[self.experts[0]]
        if self.rows is not None:  # zero rows up to a multiple of the tensor-parallel size
            padding = -whole.shape[0] % self.size
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        if self.axis is None:
            return whole
        halves = whole.chunk(2, 0) if self.gated else (whole,)
        return torch.cat([half.chunk(self.size, self.axis)[self.rank] for half in halves], 0)


def join_all(shard: Shard, pieces: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """The whole tensor from the pieces by place."""
    by_experts: list[dict[int, torch.Tensor]] = [{} for _ in range(shard.experts[1])]
    for (experts, rank), piece in pieces.items():
        by_experts[experts][rank] = piece
    return torch.cat([join(shard, part) for part in by_experts], 0)


def join(shard: Shard, pieces: dict[int, torch.Tensor]) -> torch.Tensor:
    """The tensor from the pieces by rank."""
    if shard.axis is None:
        return pieces[0][: shard.rows]
    ordered = [pieces[rank] for rank in range(shard.size)]
    if not shard.gated:
        return torch.cat(ordered, shard.axis)[: shard.rows]
    halves = [torch.cat([piece.chunk(2, 0)[half] for piece in ordered], 0) for half in (0, 1)]
    return torch.cat(halves, 0)


def named_shards(chunks: list[MoELlava]) -> Iterator[tuple[str, torch.Tensor, Shard]]:
    """(whole tensor's name, local tensor, place) of every parameter and persistent buffer of this rank."""
    for chunk in chunks:
        tensors = [*chunk.named_parameters(), *((n, b) for n, b in chunk.named_buffers() if n.endswith("expert_bias"))]
        for name, tensor in tensors:
            yield _global_name(chunk, name), tensor, _shard(chunk, name, tensor)


def _global_name(chunk: MoELlava, name: str) -> str:
    """Layers and experts are numbered over the whole model; a tied output layer is the embedding."""
    if chunk.share_embeddings_and_output_weights and name == "language_model.output_layer.weight":
        return "language_model.embedding.word_embeddings.weight"
    if name.startswith("language_model.decoder.layers."):
        head, number, tail = re.match(r"(language_model\.decoder\.layers\.)(\d+)(.*)", name).groups()
        name = f"{head}{chunk.language_model.decoder.layers[int(number)].layer_number - 1}{tail}"
    for pattern in LOCAL_EXPERT:
        found = pattern.search(name)
        if found:
            before, linear, kind, *after = found.groups()
            local = int(before or after[0])
            part = {"vision_tower": "tower"}.get(name.partition(".")[0], name.partition(".")[0].removesuffix("_model"))
            experts = chunk.run.mixtures[part].num_moe_experts
            per_rank = experts // parallel_state.get_expert_model_parallel_world_size()
            expert = parallel_state.get_expert_model_parallel_rank() * per_rank + local
            return f"{name[: found.start()]}.experts.{expert}.{linear}.{kind}"
    return name


def _shard(chunk: MoELlava, name: str, tensor: torch.Tensor) -> Shard:
    if name.startswith("adapters."):
        return _shard_of_adapter(name, tensor)
    vocabulary = ".word_embeddings." in name or ".output_layer." in name
    rows = chunk.backbone.vocab_size if vocabulary else None
    if ".experts." in name:
        rank, size = (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    else:
        rank, size = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
    if not getattr(tensor, "tensor_model_parallel", False) or size == 1:
        return Shard(None, 0, 1, False, rows)
    gated = name.startswith("language_model.") and ".linear_fc1." in name and chunk.config.gated_linear_unit
    return Shard(tensor.partition_dim, rank, size, gated, rows)


def _shard_of_adapter(name: str, tensor: torch.Tensor) -> Shard:
    """Rows of an adapter's B and columns of its A are cut in one piece; those of experts lie behind each other."""
    is_expert = "/mlp/experts/" in name
    part = "expert_tensor" if is_expert else "tensor_model"
    rank, size = (getattr(parallel_state, f"get_{part}_parallel_{what}")() for what in ("rank", "world_size"))
    experts = (0, 1)
    if is_expert and tensor.dim() == 3:
        experts = (
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
    if not getattr(tensor, "tensor_model_parallel", False) or size == 1:
        return Shard(None, 0, 1, False, None, experts)
    return Shard(tensor.partition_dim, rank, size, False, None, experts)


def fill(chunks: list[MoELlava]) -> None:
    """Overwrite every parameter by its share of the whole tensor that its name stands for."""
    for name, tensor, shard in named_shards(chunks):
        shape = list(tensor.shape)
        if shard.axis is not None:
            shape[shard.axis] *= shard.size
        shape[0] *= shard.experts[1]
        if shard.rows is not None:
            shape[0] = shard.rows
        with torch.no_grad():
            tensor.copy_(shard.cut(draw(name, shape)))


def draw(name: str, shape: list[int]) -> torch.Tensor:
    """Values that depend on the name alone, of a size at which every part of the model matters to the loss."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.05 * values
    if name.startswith("adapters.") and not name.endswith(".a"):
        return 0.1 * values
    if "norm" in name or "ln_pre" in name:
        return 1.0 + 0.1 * values
    if "embedding" in name or "class_token" in name:
        return 0.5 * values
    return values / shape[-1] ** 0.5 if len(shape) == 2 else values / values[0].numel() ** 0.5


# --- gathering --------------------------------------------------------------------------------------------------------


def gather_parameters(chunks: list[MoELlava]) -> tuple[dict[str, torch.Tensor], float]:
    """Whole tensors on rank 0 (empty elsewhere), and the largest difference between copies of one shard."""
    return _gather([(name, tensor.detach().clone(), 0, shard) for name, tensor, shard in named_shards(chunks)])


def gather_gradients(chunks: list[MoELlava], optimizer) -> tuple[dict[str, torch.Tensor], float]:
    """The same for the reduced gradients of every trained parameter, from the ranges that each rank's optimizer owns."""
    if isinstance(optimizer, LayerWiseDistributedOptimizer):  # every rank has all of them
        return _gather(
            [
                (name, tensor.main_grad.detach().clone(), 0, shard)
                for name, tensor, shard in named_shards(chunks)
                if tensor.requires_grad
            ]
        )
    places = {id(tensor): (name, shard) for name, tensor, shard in named_shards(chunks)}
    pieces = []
    for item in distributed_optimizers(optimizer):
        for buffer in item.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        name, shard = places[id(parameter)]
                        own = ranges["param"]
                        values = parameter.main_grad.detach().view(-1)[own.start : own.end].clone()
                        pieces.append((name, _Range(values, parameter.shape), own.start, shard))
    return _gather(pieces)


@dataclass(frozen=True, slots=True)
class _Range:
    values: torch.Tensor
    shape: torch.Size


def _gather(pieces: list) -> tuple[dict[str, torch.Tensor], float]:
    everywhere = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pieces, everywhere)
    if everywhere is None:
        return {}, 0.0
    local: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
    places: dict[str, Shard] = {}
    difference = 0.0
    for name, value, start, shard in (piece for rank in everywhere for piece in rank):
        places[name] = shard
        by_rank = local.setdefault(name, {})
        if isinstance(value, _Range):
            whole = by_rank.setdefault(shard.place, torch.full(value.shape, float("nan")))
            part = whole.view(-1)[start : start + len(value.values)]
            difference = max(difference, float((part - value.values).abs().nan_to_num().max()))
            part.copy_(value.values)
        elif shard.place in by_rank:
            difference = max(difference, float((by_rank[shard.place] - value.float()).abs().max()))
        else:
            by_rank[shard.place] = value.float()
    return {name: join_all(places[name], by_rank) for name, by_rank in local.items()}, difference
