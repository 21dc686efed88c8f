"""How the model is divided over processes: sizes that must divide each other."""

from collections.abc import Iterator

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import RunConfig


def parallel_problems(run: RunConfig, backbone: Backbone, world_size: int) -> Iterator[str]:
    """Sizes that must divide each other, and what each kind of parallelism needs of the others."""
    parallel = run.parallel
    tensor = parallel.tensor_model_parallel_size
    sizes = {
        "num_attention_heads": backbone.num_attention_heads,
        "num_query_groups": backbone.num_query_groups,
        "ffn_hidden_size": backbone.ffn_hidden_size,
    }
    if (latent := backbone.multi_latent_attention) is not None:
        sizes["q_lora_rank"] = latent.q_lora_rank or 0
        sizes["kv_lora_rank + qk_pos_emb_head_dim"] = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
    for name, size in sizes.items():
        if size % tensor:
            yield (
                f"parallel.tensor_model_parallel_size={tensor} does not divide {name}={size} ({backbone.name}); "
                f"use {divisors(size)}"
            )
    yield from _pipeline(run, backbone)
    model = tensor * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    if world_size % model:
        yield (
            f"{world_size} processes cannot be divided into groups of tensor x pipeline x context = {model}; start a "
            f"multiple of {model} processes, or change parallel.*"
        )
    expert = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or 1)
    per_stage = world_size // parallel.pipeline_model_parallel_size
    if per_stage % expert:
        yield (
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} x expert_tensor_parallel_size="
            f"{parallel.expert_tensor_parallel_size or 1} does not divide the {per_stage} processes of a pipeline stage; "
            f"use {divisors(per_stage)}"
        )
    if parallel.sequence_parallel and tensor == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1; leave it unset"
    if parallel.sequence_parallel is False and tensor > 1 and run.moe is not None:
        yield "parallel.sequence_parallel=false: Megatron-Core's MoE layers need it with tensor parallelism; leave it unset"
    if run.data.seq_length % parallel.sequence_multiple:
        yield (
            f"data.seq_length={run.data.seq_length} must be a multiple of {parallel.sequence_multiple} (tensor-parallel size"
            " x two chunks for each context-parallel rank)"
        )


def _pipeline(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    parallel = run.parallel
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    if virtual == 1:
        yield "parallel.virtual_pipeline_model_parallel_size=1 is no interleaved pipeline; use 2 or more, or leave it unset"
    if virtual is not None and stages == 1:
        yield f"parallel.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size > 1"
    if virtual is not None and not run.data.packing:
        # megatron-core 0.19.2, p2p_communication.py: stages exchange shapes before rows, and cross them when interleaved.
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={virtual} needs rows of one length (data.packing=true): "
            "Megatron-Core mixes up the shapes of padded rows in an interleaved pipeline; leave it unset"
        )
    if parallel.pipeline_split != "even":
        yield from _pipeline_split(run, backbone)
        return
    if first is not None and (stages == 1 or not 0 < first < backbone.num_layers):
        yield (
            f"parallel.num_layers_in_first_pipeline_stage={first} needs several pipeline stages and a number between 1 "
            f"and {backbone.num_layers - 1} ({backbone.name})"
        )
    elif first is not None and (backbone.num_layers - first) % (stages - 1):
        yield (
            f"parallel.num_layers_in_first_pipeline_stage={first} leaves {backbone.num_layers - first} layers, which the "
            f"other {stages - 1} stages cannot share equally"
        )
    elif first is None and backbone.num_layers % (stages * (virtual or 1)):
        yield (
            f"parallel.pipeline_model_parallel_size={stages} x virtual stages {virtual or 1} does not divide num_layers="
            f"{backbone.num_layers} ({backbone.name}); use {divisors(backbone.num_layers)} in all, or "
            "num_layers_in_first_pipeline_stage"
        )


def _pipeline_split(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    parallel, split = run.parallel, run.parallel.pipeline_split
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if parallel.num_layers_in_first_pipeline_stage is not None:
        yield f"parallel.pipeline_split={split} and num_layers_in_first_pipeline_stage exclude each other; drop one of them"
    if parallel.pipeline_model_parallel_size == 1:
        yield f"parallel.pipeline_split={split} needs pipeline_model_parallel_size > 1"
    if split == "cost" and stages > backbone.num_layers:
        yield f"parallel.pipeline_split=cost: {stages} stages for {backbone.num_layers} layers ({backbone.name}); use fewer"
    elif not isinstance(split, str) and (len(split) != stages or sum(split) != backbone.num_layers or min(split) < 1):
        yield (
            f"parallel.pipeline_split={list(split)} must be {stages} numbers from 1 on, in all {backbone.num_layers} "
            f"({backbone.name}), in the order of the model"
        )


def divisors(number: int) -> str:
    """12 -> "1, 2, 3, 4, 6 or 12": what a message proposes."""
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= 64]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
