"""The true full-size model of a rank, built and run on fake tensors: shapes without numbers, no memory behind them.

torch's fake process group plays the other ranks, FakeTensorMode the memory. The model, DDP's buffers, the optimizer and
one micro-batch forward and backward are the code that trains. What differs, because a fake tensor has no values:
routing is forced to be balanced (the number of tokens for each expert is data), visual tokens land in the rows without
the check that counts placeholders, and random generators stand still. It runs on CPU modules, so what autograd keeps is
compared with the planner's `local` table, not with the GPU's.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_moellava.platform as platform
from megatron_moellava import parallel
from megatron_moellava.config import ConfigError, RunConfig
from megatron_moellava.costs.layout import Layout
from megatron_moellava.data.pooling import Pools, pools
from megatron_moellava.machine import GPU_CLUSTER
from megatron_moellava.model import grouped_products
from megatron_moellava.model.build import build_model
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.pooling import pooled
from megatron_moellava.model.roles import freeze, parameter_roles
from megatron_moellava.model.vision import Grids
from megatron_moellava.planning.counting import SavedTensors, flop_counter, storage_bytes
from megatron_moellava.towers import POOLINGS
from megatron_moellava.training.optimizer import build_optimizer, distributed_optimizers, wrap_data_parallel
from megatron_moellava.validation.precision import decided

from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

ADAM_MOMENTS = 8  # bytes per element, made at the first step


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What one rank really holds and computes for one micro-batch. Bytes and FLOPs."""

    parameters: dict[str, int]  # role -> elements
    weights: int
    gradients: int
    optimizer: int
    activations: int
    forward_flops: int
    backward_flops: int

    @property
    def num_parameters(self) -> int:
        """Elements of all roles."""
        return sum(self.parameters.values())


def count_rank(layout: Layout, pipeline_rank: int) -> Counted:
    """Build and run one rank of a pipeline stage. Its tensor, expert and data peers hold the same shapes."""
    layout = replace(layout, run=decided(layout.run, GPU_CLUSTER)[0])
    with _fake_world(layout, pipeline_rank), _without_values(), FakeTensorMode():
        chunks = build_model(_dry(layout))
        for chunk in chunks:
            freeze(chunk, layout.trains)
            _balance(chunk)
        parameters: Counter[str] = Counter()
        for chunk in chunks:
            for role, _, parameter in parameter_roles(chunk):
                parameters[role] += parameter.numel()
        weights = storage_bytes(parameter for chunk in chunks for parameter in chunk.parameters())
        wrapped = wrap_data_parallel(layout.run, chunks)
        buffers = [buffer for item in wrapped for buffer in [*item.buffers, *item.expert_parallel_buffers]]
        gradients = storage_bytes(buffer.grad_data for buffer in buffers)
        optimizer = _optimizer_bytes(layout, wrapped)
        activations, forward, backward = _step(layout, chunks, wrapped)
    return Counted(
        parameters=dict(parameters),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        forward_flops=forward,
        backward_flops=backward,
    )


def _dry(layout: Layout) -> RunConfig:
    """The original's gate and a capacity decide by values: Megatron-Core's dropless router has the same shapes."""
    run = layout.run
    if run.moe is None:
        return run
    moe = replace(run.moe, router="megatron", moe_expert_capacity_factor=None, moe_token_dispatcher_type="alltoall")
    return replace(run, moe=moe)


@contextlib.contextmanager
def _fake_world(layout: Layout, pipeline_rank: int) -> Iterator[None]:
    """This process as the first rank of a pipeline stage among `world_size` that do not exist."""
    if dist.is_initialized():
        raise ConfigError("a dry run makes its own process group; run it alone, without torchrun")
    rank = pipeline_rank * (layout.world_size // layout.pp)
    options = layout.run.parallel
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=options.virtual_pipeline_model_parallel_size,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,  # those would look for their peers
        )
        parallel.seed_model_parallel(layout.run.training.seed)
        yield
    finally:
        parallel.shutdown()


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
    """Step over what reads values, looks for peers or is a CPU's alone (generators, moving parameters, gloo, rounded rows)."""
    stand_ins = (
        (megatron_random.CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
        (megatron_random, "_get_all_rng_states", lambda: ()),
        (megatron_random, "_set_all_rng_states", lambda *_: None),
        (MoEAuxLossAutoScaler, "main_loss_backward_scale", None),  # it outlives the model, and would stay fake
        (MoELlava, "to", lambda self, *_: self),
        (grouped_products, "ROUNDED_UP_TO", 1),  # products of an expert's own rows, as a GPU has them
        (dist, "all_gather_object", _everyone_says_the_same),
        (parallel_state, "get_data_parallel_group_gloo", lambda *_, **__: parallel_state.get_data_parallel_group()),
        (
            parallel_state,
            "get_expert_data_parallel_group_gloo",
            lambda *_, **__: parallel_state.get_expert_data_parallel_group(),
        ),
    )
    kept = [(owner, name, owner.__dict__[name]) for owner, name, _ in stand_ins if name in owner.__dict__]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, _ in stand_ins:
            delattr(owner, name)
        for owner, name, original in kept:
            setattr(owner, name, original)


def _everyone_says_the_same(answers: list, answer: object, group=None) -> None:
    answers[:] = [answer] * len(answers)


def _balance(chunk: MoELlava) -> None:
    """Give every token dispatcher its counts as plain numbers: each expert the same share of the tokens."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            dispatcher = module.token_dispatcher
            dispatcher.preprocess = _balanced_preprocess(dispatcher)
            order = numpy.arange(dispatcher.num_experts * dispatcher.tp_size)
            local = dispatcher.num_local_experts
            dispatcher.sort_input_by_local_experts = order.reshape(-1, local).T.ravel()
            dispatcher.restore_output_by_local_experts = order.reshape(local, -1).T.ravel()


def _balanced_preprocess(dispatcher):
    """Stands for MoEAlltoAllTokenDispatcher.preprocess of Megatron-Core 0.19, which sums the routing map."""

    def preprocess(routing_map_NE: torch.Tensor) -> numpy.ndarray:
        routed, experts = routing_map_NE.shape[0] * dispatcher.config.moe_router_topk, dispatcher.num_experts
        counts_E = numpy.full(experts, routed // experts)
        counts_E[: routed % experts] += 1
        first = dispatcher.local_expert_indices[0]
        local = counts_E[first : first + dispatcher.num_local_experts]
        dispatcher.num_out_tokens = routed
        dispatcher.input_splits = counts_E.reshape(dispatcher.ep_size, -1).sum(axis=1)
        dispatcher.output_splits = numpy.full(dispatcher.ep_size, local.sum())
        dispatcher.output_splits_tp = numpy.full(dispatcher.tp_size, local.sum() * dispatcher.ep_size)
        sources = dispatcher.tp_size * dispatcher.ep_size
        dispatcher.num_global_tokens_per_local_expert = numpy.tile(local, (sources, 1))
        return local * sources

    return preprocess


def _optimizer_bytes(layout: Layout, wrapped: list) -> int:
    """fp32 copies of this rank's share of the parameters, and Adam's two moments for each."""
    shards = [
        shard
        for item in distributed_optimizers(build_optimizer(layout.run, wrapped))
        for group in item.optimizer.param_groups
        for shard in group["params"]
    ]
    parameters = {buffer.param_data.untyped_storage()._cdata for item in wrapped for buffer in _buffers(item)}
    copies = [shard for shard in shards if shard.untyped_storage()._cdata not in parameters]
    return storage_bytes(copies) + ADAM_MOMENTS * sum(shard.numel() for shard in shards)


def _buffers(wrapped) -> list:
    return [*wrapped.buffers, *wrapped.expert_parallel_buffers]


def _step(layout: Layout, chunks: list[MoELlava], wrapped: list) -> tuple[int, int, int]:
    """(bytes kept, forward FLOPs, backward FLOPs) of one micro-batch through every chunk of this rank."""
    kept = forward = backward = 0
    for chunk, model in zip(chunks, wrapped, strict=True):
        chunk.train()
        saved = SavedTensors(excluded=chunk.parameters())
        with flop_counter() as flops:
            with saved:
                output = _forward(layout, chunk, model)
            done = flops.get_total_flops()
            kept += saved.bytes  # before the backward pass, whose recomputation keeps more
            output.float().sum().backward()
        forward, backward = forward + done, backward + flops.get_total_flops() - done
    return kept, forward, backward


def _forward(layout: Layout, chunk: MoELlava, model) -> torch.Tensor:
    shape = (layout.run.training.micro_batch_size, layout.run.data.seq_length)
    device = platform.device()
    tokens_BS = torch.zeros(shape, dtype=torch.long, device=device)
    embeddings_SBD = None
    if chunk.pre_process:
        embeddings_SBD = _embed(layout, chunk, tokens_BS)
    else:
        size = (shape[1] // layout.sp, shape[0], layout.backbone.hidden_size)
        dtype = chunk.config.params_dtype
        chunk.set_input_tensor(torch.zeros(size, dtype=dtype, device=device, requires_grad=True))
    return model(
        tokens_BS=tokens_BS,
        position_ids_BS=tokens_BS,
        labels_BS=tokens_BS,
        padding_mask_BS=torch.ones(shape, dtype=torch.bool, device=device),
        embeddings_SBD=embeddings_SBD,
    )


def _embed(layout: Layout, chunk: MoELlava, tokens_BS: torch.Tensor) -> torch.Tensor:
    """`MoELlava.embed` for the fullest micro-batch, without its count of placeholder rows."""
    count, grids, pools = fullest_pictures(layout)
    pixels_NCHW = torch.zeros(count, *layout.tower.pixel_shape, device=platform.device())
    features_NFD = chunk.encode_images(pixels_NCHW, grids)
    visual_RD = [pooled(features_NFD, pools)]
    for branch in layout.branches:
        pixels_NCHW = torch.zeros(layout.images, *branch.seen_by(layout.tower).pixel_shape, device=platform.device())
        visual_RD.append(chunk.encode_images(pixels_NCHW, modality=branch.modality).flatten(0, -2))
    words_BSD = chunk.language_model.embedding(tokens_BS, position_ids=None).transpose(0, 1)
    is_image_BS1 = (tokens_BS == 1).unsqueeze(-1)
    features_RD = torch.cat(visual_RD) if len(visual_RD) > 1 else visual_RD[0]
    placed_BSD = words_BSD.masked_scatter(is_image_BS1, features_RD.to(words_BSD.dtype))
    return placed_BSD.transpose(0, 1).contiguous()


def fullest_pictures(layout: Layout) -> tuple[int, Grids, Pools]:
    """(images, their grids, if there are some, and how frames of videos are pooled) of the fullest micro-batch; at native
    resolution (patches, their grids), all at their budget."""
    tower = layout.tower
    if not tower.native:
        frames, _ = layout.fullest_sample
        video = pools(
            [(number, frames) for number in range(frames)], [1] * frames, POOLINGS[layout.run.data.video_pooling]
        )
        grids = ((0, 0, 0, 0),) * layout.images if tower.newline else ()
        return layout.images, grids, video * (layout.images // frames)
    rows = largest_side(tower.num_features)
    grid = (rows * tower.shuffle, tower.num_features // rows * tower.shuffle)
    return layout.images * tower.num_patches, (grid,) * layout.images, ()


def largest_side(tokens: int) -> int:
    """The larger a side that divides `tokens`, the closer the picture is to a square."""
    return max(side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0)
