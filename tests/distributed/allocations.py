"""A job that measures what a real training step allocates on each rank, beside what the planner says of that layout."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.backbones import BACKBONES
from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.costs.layout import Layout
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.loader import Batches
from megatron_moellava.planning.counting import optimizer_bytes, storage_bytes
from megatron_moellava.planning.memory import memory_of, state_bytes
from megatron_moellava.towers import get_tower
from megatron_moellava.training.loop import Trainer

from megatron.core import parallel_state

# Large enough that activations and states, not masks and indices, make the sum: tens of megabytes on a rank.
WIDTH = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "kv_channels": 32, "vocab_size": 4096}
SIZED = {
    "llama-tiny": replace(BACKBONES["llama-tiny"], **WIDTH, ffn_hidden_size=704, num_query_groups=4),
    "phi-2-tiny": replace(BACKBONES["phi-2-tiny"], **WIDTH, ffn_hidden_size=1024, num_query_groups=8),
}
SEQ_LENGTH, ROWS = 512, 8
STEPS = 3  # gloo's threads let go of their copies sooner or later: the least of so many peaks says what the model needs


class FullRows(Batches):
    """A loader of rows without padding: one image, the rest text."""

    def __init__(self, features: int, side: int):
        self.features, self.side = features, side

    def __next__(self) -> Batch:
        tokens_BS = torch.randint(3, WIDTH["vocab_size"] - 1, (1, SEQ_LENGTH))
        labels_BS = tokens_BS.clone()
        tokens_BS[:, : self.features] = IMAGE_TOKEN
        return Batch(
            tokens_BS=tokens_BS,
            labels_BS=labels_BS,
            position_ids_BS=torch.arange(SEQ_LENGTH)[None],
            padding_mask_BS=torch.ones(1, SEQ_LENGTH, dtype=torch.bool),
            cu_seqlens=None,
            max_seqlen=SEQ_LENGTH,
            pixel_values_NCHW=torch.randn(1, 3, self.side, self.side),
            sample_ids=["0"],
            tags=[""],
        )


def run_of(settings: dict) -> RunConfig:
    tree: dict = {}
    common = {
        "model.backbone": "llama-tiny",
        "model.tower": "clip-tiny",
        "data.packing": False,
        "data.seq_length": SEQ_LENGTH,
        "training.stage": 3,
        "training.precision": "bf16",
        "training.global_batch_size": ROWS,
        "parallel.distributed_timeout_minutes": 1,
        "logging.tensorboard": False,
        "logging.routing_interval": 1_000_000,
    }
    for name, value in (common | settings).items():
        set_override(tree, name, value)
    return from_dict(RunConfig, tree)


def measure_allocations(job: dict, folder: Path) -> dict:
    """For every rank: [measured, predicted] bytes of states and of a step's peak."""
    run, tower = run_of(job["settings"]), get_tower("clip-tiny")
    backbone = BACKBONES[run.model.backbone]
    BACKBONES[backbone.name] = SIZED[backbone.name]
    try:
        parallel.initialize(run.parallel, run.training.seed)
        trainer = Trainer(run, None, 10)
    finally:
        BACKBONES[backbone.name] = backbone
    if parallel.reads_data():
        trainer.loader = FullRows(tower.num_features, tower.image_size)
    trainer.step()  # the optimizer makes its states in the first step
    layout = Layout(run=run, backbone=SIZED[backbone.name], tower=tower, world_size=dist.get_world_size())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _measured(trainer, layout))
    return {"ranks": everyone}


def _measured(trainer: Trainer, layout: Layout) -> dict[str, list[float]]:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    predicted = memory_of(layout, rank, "local", imbalance=1.0)
    weights, gradients, optimizer = state_bytes(layout, rank)
    buffers = [buffer for item in trainer.wrapped for buffer in [*item.buffers, *item.expert_parallel_buffers]]
    parameters = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    return {
        "weights": [storage_bytes(parameters), weights],
        "gradients": [storage_bytes(buffer.grad_data for buffer in buffers), gradients],
        "optimizer": [optimizer_bytes(trainer.optimizer, buffers), optimizer],
        "step": [
            min(step_peak(trainer) for _ in range(STEPS)),
            predicted.activations + predicted.working + predicted.dispatch,
        ],
    }


def step_peak(trainer: Trainer) -> int:
    """Bytes above the states at the worst moment of all forward and backward passes of a step, by torch's allocator.

    Without the reduction of gradients after them, in which gloo clones what it scatters; nccl needs no such copy.
    """
    for chunk in trainer.chunks:
        chunk.config.finalize_model_grads_func = lambda *arguments, **options: None
    batches = [trainer._next_batch() for _ in range(trainer.num_microbatches)]
    for wrapped in trainer.wrapped:
        wrapped.zero_grad_buffer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer._forward_backward(batches, SEQ_LENGTH)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))
