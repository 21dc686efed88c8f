"""A model of the recordings under the layout of this run: build it, run it, read its tensors by the original's names.

Every data-parallel rank gets the same batch, so that the mean over ranks is the one-process result. What is read is
put together from all ranks through the names and offsets of the sharded checkpoint, and every rank returns all of it.
Shapes: B rows, S positions, V vocabulary, D width, N tokens of a micro-batch, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import MoEConfig, RunConfig
from megatron_moellava.conversion.layout import ORIGINAL, Entry, Layout, entries
from megatron_moellava.costs.shapes import Model
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IGNORE_INDEX
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.original_gate import Draw, Gate, OriginalGate, no_noise
from megatron_moellava.model.router import OriginalRouter
from megatron_moellava.model.weights import load_weights, model_state
from megatron_moellava.routing.observer import RouterCall, RoutingObserver
from megatron_moellava.training.loop import global_token_mean

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

Pick = Callable[[torch.nn.Parameter], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to verify: what it is, and the Megatron checkpoint that was made of the recorded one."""

    model: Model
    checkpoint: str

    def run(self, run: RunConfig, moe: MoEConfig | None = None) -> RunConfig:
        """`run` for this model; `moe` replaces the settings of its gates. The way experts are computed is the run's."""
        moe = moe or self.model.moe
        if moe and run.moe:
            moe = replace(
                moe,
                moe_grouped_gemm=run.moe.moe_grouped_gemm,
                moe_token_dispatcher_type=run.moe.moe_token_dispatcher_type,
            )
        model = replace(run.model, backbone=self.checkpoint, tower=self.checkpoint)
        parallel = run.parallel if moe else replace(run.parallel, expert_model_parallel_size=1)  # more data parallelism
        return replace(run, model=model, moe=moe, parallel=parallel)

    @property
    def num_features(self) -> int:
        """Visual tokens of an image."""
        assert self.model.tower is not None
        return self.model.tower.num_features


@dataclass(frozen=True, slots=True)
class Gating:
    """What one router was given and what it decided."""

    logits_NE: torch.Tensor
    gate: Gate


@dataclass(slots=True)
class Session:
    """`chunks` are this rank's pipeline stages, on their device."""

    run: RunConfig
    model: Model
    chunks: list[MoELlava]
    gatings: dict[int, Gating] = field(default_factory=dict)  # by layer, of the last forward pass on this rank
    observer: RoutingObserver = field(init=False)

    def __post_init__(self) -> None:
        self.observer = RoutingObserver(self.chunks)

    def _keep(self, call: RouterCall) -> None:
        if call.gating is not None:
            self.gatings[call.layer] = Gating(*call.gating)

    @property
    def multiple(self) -> int:
        """Rows must divide by it: sequence parallelism cuts them."""
        return self.run.parallel.tensor_model_parallel_size

    # --- running ----------------------------------------------------------------------------------------------------

    def inject(self, noise: dict[str, torch.Tensor] | None) -> None:
        """Noise [N, E] by the original's name of the gate; None: zeros."""
        names = gate_names(self.model)
        for layer, gate in original_gates(self.observer).items():
            gate.noise = partial(_recorded_noise, noise[names[layer]]) if noise else no_noise

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of all chunks."""
        for chunk in self.chunks:
            chunk.train(mode)

    def logits(self, batch: Batch, embeddings_BSD: torch.Tensor | None = None) -> torch.Tensor:
        """[B, S, V] on every rank, without a graph. `embeddings_BSD` replaces tokens and images."""
        inputs = model_inputs(batch) | {"labels_BS": None}
        if embeddings_BSD is not None:
            inputs["embeddings_SBD"] = padded_to(embeddings_BSD, batch.tokens_BS.shape[1]).transpose(0, 1).contiguous()
        found = self._schedule(inputs, lambda output: {"logits": output.float()}, non_loss=True)
        return from_any_rank(found[0]["logits"] if found else None)

    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy of the batch, forward only."""
        return self._loss(batch, forward_only=True)

    def backward(self, batch: Batch) -> float:
        """Mean cross-entropy of the batch, and its gradients, summed over the layout as in training (`gradients`)."""
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
        config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        wrapped = [DistributedDataParallel(chunk.config, config, chunk) for chunk in self.chunks]
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        return self._loss(batch, forward_only=False, model=wrapped)

    def _loss(self, batch: Batch, forward_only: bool, model: list | None = None) -> float:
        tokens = int((batch.labels_BS != IGNORE_INDEX).sum())
        measure = partial(global_token_mean, scale=1.0 / tokens)
        sums = self._schedule(model_inputs(batch), measure, forward_only=forward_only, model=model)
        return from_any_rank(float(sum(sums)) / tokens if sums else None)

    def _schedule(
        self,
        inputs: dict,
        measure: Callable,
        forward_only: bool = True,
        model: list | None = None,
        non_loss: bool = False,
    ) -> list:
        model = model or self.chunks
        inputs = {
            name: value.to(platform.device()) if torch.is_tensor(value) else value for name, value in inputs.items()
        }

        def step(_, chunk):
            output = chunk(**inputs)
            return output, (lambda result, non_loss_data=True: measure(result)) if non_loss else measure

        with torch.set_grad_enabled(not forward_only), self.observer.watch(self._keep):
            return get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=[None] * len(model) if len(model) > 1 else None,
                model=model,
                num_microbatches=1,
                seq_length=inputs["tokens_BS"].shape[1],
                micro_batch_size=len(inputs["tokens_BS"]),
                forward_only=forward_only,
                collect_non_loss_data=non_loss,
            )

    # --- reading ----------------------------------------------------------------------------------------------------

    def gates(self) -> dict[str, Gating]:
        """The last forward pass's gates of all pipeline stages, by the original's name."""
        names = gate_names(self.model)
        found: dict[str, Gating] = {}
        for part in everywhere(self.gatings):
            found |= {names[layer]: gating for layer, gating in part.items()}
        return found

    def tensors(self, pick: Pick, layout: Layout = ORIGINAL) -> dict[str, torch.Tensor]:
        """`pick` of every parameter (None: left out), whole, by the names of a layout."""
        return to_layout(self.model, gathered(self.chunks, pick), layout)

    def gradients(self, layout: Layout = ORIGINAL) -> dict[str, torch.Tensor]:
        """The gradients, whole, by the names of a layout."""
        return self.tensors(lambda parameter: getattr(parameter, "main_grad", None), layout)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters, whole, by the original's names."""
        return self.tensors(lambda parameter: parameter.detach())


def open_session(run: RunConfig, subject: Subject, moe: MoEConfig | None = None) -> Session:
    """The model with its weights, in the layout of `run`; `moe` replaces the settings of its gates."""
    run = subject.run(run, moe)
    chunks = build_model(run)
    load_weights(require_checkpoint(subject.checkpoint), chunks)
    return Session(run, subject.model, chunks)


def original_gates(observer: RoutingObserver) -> dict[int, OriginalGate]:
    """The original's gates of this rank by layer, from 0."""
    routers = observer.routers.items()
    return {layer: router.gate for layer, router in routers if isinstance(router, OriginalRouter)}


def _recorded_noise(noise_NE: torch.Tensor, logits_NE: torch.Tensor, draw: Draw) -> torch.Tensor:
    return noise_NE.to(logits_NE)


def gate_names(model: Model) -> dict[int, str]:
    """The original's module name of every gate, by layer."""
    names = {entry.megatron: entry.names[0] for entry in entries(model, ORIGINAL)}
    key = "language_model.decoder.layers.{}.mlp.router.weight"
    return {layer: names[key.format(layer)].removesuffix(".wg.weight") for layer in model.moe_layers}


def padded_to(embeddings_BSD: torch.Tensor, length: int) -> torch.Tensor:
    """[B, S, D] with zeros behind up to `length` positions."""
    return torch.nn.functional.pad(embeddings_BSD, (0, 0, 0, length - embeddings_BSD.shape[1]))


def everywhere(item: object) -> list:
    """`item` of every rank."""
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found


def from_any_rank(item: Any) -> Any:
    """The value of a rank that has one: the last pipeline stage's."""
    return next(value for value in reversed(everywhere(item)) if value is not None)


def gathered(chunks: list[MoELlava], pick: Pick) -> dict[str, torch.Tensor]:
    """Whole tensors by Megatron key, put together from every rank's shards."""
    shards = []
    for leaf in model_state(chunks).values():
        picked = pick(leaf.data) if isinstance(leaf, ShardedTensor | ShardedTensorFactory) else None
        if picked is None:
            continue
        state = {"leaf": replace(leaf, data=picked.detach())}
        apply_factories(state)  # [gate; up] of a shard lie in two places of the whole tensor
        parts = state["leaf"].values() if isinstance(state["leaf"], dict) else state["leaf"]
        for part in parts if not isinstance(parts, ShardedTensor) else [parts]:
            shards.append((part.key, part.global_shape, part.global_offset, part.prepend_axis_num, part.data.float()))
    whole: dict[str, torch.Tensor] = {}
    for rank in everywhere(shards):
        for key, shape, offset, prepended, data in rank:
            target = whole.setdefault(key, torch.full(shape, float("nan")))
            view = target[tuple(offset[:prepended])]
            view[
                tuple(slice(start, start + size) for start, size in zip(offset[prepended:], data.shape, strict=True))
            ] = data.cpu()
    return whole


def without_tied_head(model: Model, recorded: dict) -> dict:
    """What is recorded by name, less an output layer that is the word embedding: it has no tensor of its own here."""
    if not model.backbone.share_embeddings_and_output_weights:
        return recorded
    heads = {mapping.hf[0] for mapping in model.backbone.mapping if mapping.megatron == "output_layer.weight"}
    return {name: value for name, value in recorded.items() if name not in heads}


def to_layout(model: Model, tensors: dict[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """Megatron tensors taken apart into those of a layout, through the mapping that converts checkpoints."""
    found: dict[str, torch.Tensor] = {}
    for entry in entries(model, layout):
        if entry.megatron in tensors:
            found |= _taken_apart(entry, tensors[entry.megatron])
    return found


def _taken_apart(entry: Entry, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    flat = tensor[: entry.shape[0]].reshape(-1)  # a vocabulary may be padded for tensor parallelism
    parts = [torch.full(shape, float("nan")) for shape in entry.shapes]
    position = 0
    for span in entry.spans:
        parts[span.tensor].view(-1)[span.start : span.start + span.count] = flat[position : position + span.count]
        position += span.count
    return dict(zip(entry.names, parts, strict=True))
