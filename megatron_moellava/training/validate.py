"""Every rule that ties the fields of a run together, checked before any weight is touched; all problems in one error."""

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_moellava import platform
from megatron_moellava.backbones import Backbone, get_backbone
from megatron_moellava.checkpoint.folders import newest_checkpoint, require_checkpoint
from megatron_moellava.config import ConfigError, MoELlavaError, RunConfig
from megatron_moellava.data.templates import get_template
from megatron_moellava.placement import moe_layers
from megatron_moellava.routers import ROUTERS, RouterKind
from megatron_moellava.stages import ROLES, STAGES
from megatron_moellava.towers import get_tower

CHOICES = {
    "training.stage": tuple(STAGES),
    "training.precision": ("bf16", "fp32"),
    "training.device": ("auto", "cpu", "cuda"),
    "training.recompute": ("none", "full", "selective", "moe"),
    "training.fp8_recipe": (None, "delayed", "tensorwise", "blockwise", "mxfp8"),
    "optimizer.lr_decay_style": ("cosine", "linear", "constant"),
    "data.image_aspect_ratio": ("pad", "square"),
    "data.label_mode": ("spans", "original"),
    "data.long_samples": ("cut", "skip"),
    "data.sampler": ("shuffle", "modality_length"),
    "moe.router": tuple(ROUTERS),
    "moe.moe_router_dtype": ("fp32", "bf16"),
    "moe.second_choice": ("sampled", "deterministic"),
    "moe.moe_token_dispatcher_type": ("alltoall", "allgather", "flex"),
    "moe.moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
}


def validate(run: RunConfig, world_size: int) -> None:
    """Raises ConfigError that lists every problem of the run on `world_size` processes: field, value, rule, fix."""
    problems = [*_choices(run), *_files(run)]
    try:
        backbone = get_backbone(run.model.backbone)
    except MoELlavaError as error:
        problems += [str(error), *_batches(run, world_size), *_training(run)]
    else:
        problems += _sizes(run, backbone, world_size)
    for look_up in (lambda: get_tower(run.model.tower), lambda: run.data.template and get_template(run.data.template)):
        try:
            look_up()
        except MoELlavaError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


def layout_problems(run: RunConfig, backbone: Backbone, world_size: int) -> list[str]:
    """The problems that do not depend on files: what the planner asks before it suggests a layout."""
    return [*_choices(run), *_sizes(run, backbone, world_size)]


def _sizes(run: RunConfig, backbone: Backbone, world_size: int) -> list[str]:
    return [
        *_parallel(run, backbone, world_size),
        *_moe(run, backbone),
        *_lengths(run, backbone),
        *_batches(run, world_size),
        *_training(run),
    ]


def _choices(run: RunConfig) -> Iterator[str]:
    for path, allowed in CHOICES.items():
        section, name = path.split(".")
        owner = getattr(run, section)
        if owner is not None and getattr(owner, name) not in allowed:
            listed = ", ".join(str(value) for value in allowed)
            yield f"{path}={getattr(owner, name)!r} is not supported; use one of: {listed}"


def _files(run: RunConfig) -> Iterator[str]:
    if not run.data.sources:
        yield "data.sources is empty; pass --data FILE.json (and --image-folder DIR)"
    for index, source in enumerate(run.data.sources):
        if not Path(source.path).exists():
            yield f"data.sources[{index}].path={source.path} does not exist; docs/data.md says where the data sets come from"
        if source.image_folder and not Path(source.image_folder).is_dir():
            yield f"data.sources[{index}].image_folder={source.image_folder} is not a folder; pass --image-folder DIR"
    if not run.data.tokenizer:
        yield "data.tokenizer is empty; pass data.tokenizer=FOLDER with the backbone's tokenizer, or a SentencePiece .model"
    elif not Path(run.data.tokenizer).exists():
        yield f"data.tokenizer={run.data.tokenizer} does not exist; it is a tokenizer folder or a SentencePiece .model"
    options = run.checkpoint
    yield from _writable(options.save)
    resumes = options.save is not None and newest_checkpoint(options.save) is not None
    if options.load is not None and not resumes:
        try:
            require_checkpoint(options.load)
        except MoELlavaError as error:
            yield str(error)
    if options.keep < 1:
        yield f"checkpoint.keep={options.keep} must be at least 1; the newest checkpoint is never deleted"
    if options.save_interval < 1:
        yield f"checkpoint.save_interval={options.save_interval} must be at least 1 step"


def _writable(save: str | None) -> Iterator[str]:
    """A folder that cannot be written to would be noticed at the first checkpoint, hours later."""
    if save is None:
        return
    existing = next(path for path in (Path(save), *Path(save).absolute().parents) if path.exists())
    if not existing.is_dir():
        yield f"checkpoint.save={save}: {existing} is not a folder; choose another one"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"checkpoint.save={save} cannot be written to ({existing} is read-only for this user); choose another folder"


def _parallel(run: RunConfig, backbone: Backbone, world_size: int) -> Iterator[str]:
    parallel = run.parallel
    tensor = parallel.tensor_model_parallel_size
    sizes = {
        "num_attention_heads": backbone.num_attention_heads,
        "num_query_groups": backbone.num_query_groups,
        "ffn_hidden_size": backbone.ffn_hidden_size,
    }
    for name, size in sizes.items():
        if size % tensor:
            yield (
                f"parallel.tensor_model_parallel_size={tensor} does not divide {name}={size} ({backbone.name}); "
                f"use {_divisors(size)}"
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
            f"use {_divisors(per_stage)}"
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
            f"{backbone.num_layers} ({backbone.name}); use {_divisors(backbone.num_layers)} in all, or "
            "num_layers_in_first_pipeline_stage"
        )
    if virtual is not None and stages == 1:
        yield f"parallel.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size > 1"


def _pipeline_split(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    parallel, split = run.parallel, run.parallel.pipeline_split
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if parallel.num_layers_in_first_pipeline_stage is not None:
        yield f"parallel.pipeline_split={split} and num_layers_in_first_pipeline_stage exclude each other; drop one of them"
    if parallel.pipeline_model_parallel_size == 1:
        yield f"parallel.pipeline_split={split} needs pipeline_model_parallel_size > 1"
    if isinstance(split, str) and split != "cost":
        yield f"parallel.pipeline_split={split!r} is unknown; use even, cost, or the layers of each stage such as [3, 5]"
    elif split == "cost" and stages > backbone.num_layers:
        yield f"parallel.pipeline_split=cost: {stages} stages for {backbone.num_layers} layers ({backbone.name}); use fewer"
    elif split != "cost" and (len(split) != stages or sum(split) != backbone.num_layers or min(split) < 1):
        yield (
            f"parallel.pipeline_split={list(split)} must be {stages} numbers from 1 on, in all {backbone.num_layers} "
            f"({backbone.name}), in the order of the model"
        )


def _moe(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    moe, parallel = run.moe, run.parallel
    if moe is None:
        if run.training.stage == 3 and run.training.trains is None:
            yield (
                "training.stage=3 trains MoE layers, and this model has none; start from a checkpoint made by "
                "`tools/convert.py upcycle`, or set moe.num_moe_experts"
            )
        if parallel.expert_model_parallel_size > 1:
            yield f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} needs a MoE model; use 1"
        return
    if moe.num_moe_experts % parallel.expert_model_parallel_size:
        yield (
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} does not divide moe.num_moe_experts="
            f"{moe.num_moe_experts}; use {_divisors(moe.num_moe_experts)}"
        )
    if not 1 <= moe.moe_router_topk <= moe.num_moe_experts:
        yield f"moe.moe_router_topk={moe.moe_router_topk} must lie between 1 and moe.num_moe_experts={moe.num_moe_experts}"
    try:
        moe_layers(moe.placement, backbone.num_layers)
    except MoELlavaError as error:
        yield str(error)
    if moe.moe_router_dtype == "bf16" and run.training.precision != "bf16":
        yield (
            f"moe.moe_router_dtype=bf16 with training.precision={run.training.precision}: the router takes the dtype of the "
            "hidden states; set training.precision=bf16, or moe.moe_router_dtype=fp32"
        )
    if (parallel.expert_tensor_parallel_size or 1) > 1 and backbone.add_bias_linear:
        yield (
            f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size}: the experts of {backbone.name} "
            "have biases, which Megatron-Core cannot split; use 1"
        )
    if moe.moe_token_dispatcher_type == "flex" and not platform.HAS_CUDA:
        yield "moe.moe_token_dispatcher_type=flex (DeepEP) needs GPUs; use alltoall"
    if moe.moe_token_dispatcher_type == "allgather" and not run.data.packing:
        yield "moe.moe_token_dispatcher_type=allgather needs rows of one length (data.packing=true); use alltoall"
    if moe.router in ROUTERS:
        yield from _router(run, ROUTERS[moe.router])


def _router(run: RunConfig, kind: RouterKind) -> Iterator[str]:
    moe, parallel = run.moe, run.parallel
    if kind.max_topk is not None and moe.moe_router_topk > kind.max_topk:
        yield (
            f"moe.moe_router_topk={moe.moe_router_topk}: the {kind.name} router has at most {kind.max_topk}; "
            "use moe.router=megatron"
        )
    if kind.always_has_capacity and moe.moe_expert_capacity_factor is None:
        yield f"moe.moe_expert_capacity_factor is unset: the {kind.name} router always has one; the released recipes use 1.5"
    if not kind.allows_packing and run.data.packing:
        yield f"moe.router={kind.name} counts places in padded batches; set data.packing=false"
    for name in kind.lacks:
        if getattr(moe, name):
            yield f"moe.{name}={getattr(moe, name)}: the {kind.name} router has no such thing; use moe.router=megatron"
    if not kind.allows_context_parallelism and parallel.context_parallel_size > 1:
        yield f"parallel.context_parallel_size: the {kind.name} router counts places over the whole sequence; use 1"
    shared = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if moe.moe_expert_capacity_factor is not None and not kind.counts_whole_sequence and shared > 1:
        yield (
            f"moe.moe_expert_capacity_factor={moe.moe_expert_capacity_factor} with tensor or context parallelism: "
            "Megatron-Core counts places in each rank's share of the sequence, so the result would depend on the "
            "layout; leave it unset (dropless)"
        )


def _lengths(run: RunConfig, backbone: Backbone) -> Iterator[str]:
    """No sample may be longer than the backbone's context. A packed row may: positions restart in every sample."""
    data, context = run.data, backbone.context_length
    window = context < backbone.max_position_embeddings
    limit = f"{'sliding_window' if window else 'max_position_embeddings'}={context} ({backbone.name})"
    if data.max_sample_length is None and not data.packing and data.seq_length > context:
        yield f"data.seq_length={data.seq_length} is more than {limit}; use at most {context}, or set data.packing=true"
    if data.max_sample_length is not None and data.max_sample_length > min(context, data.seq_length):
        yield (
            f"data.max_sample_length={data.max_sample_length} must be at most {limit} and data.seq_length="
            f"{data.seq_length}; use {min(context, data.seq_length)} or leave it unset"
        )
    least = {"seq_length": 1, "max_sample_length": 1, "packing_buffer": 1, "num_workers": 0, "max_images": 0}
    for name, minimum in least.items():
        value = getattr(data, name)
        if value is not None and value < minimum:
            yield f"data.{name}={value} must be at least {minimum}"
    if not 0 <= data.max_skip_share < 1:
        yield f"data.max_skip_share={data.max_skip_share} must lie between 0 (stop at the first bad row) and 1"


def _batches(run: RunConfig, world_size: int) -> Iterator[str]:
    training, parallel = run.training, run.parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    rows = training.micro_batch_size * max(world_size // model, 1)
    if training.micro_batch_size < 1 or training.global_batch_size < 1 or training.global_batch_size % rows:
        yield (
            f"training.global_batch_size={training.global_batch_size} must be a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data-parallel ranks {max(world_size // model, 1)} = {rows}"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual and (training.global_batch_size // max(rows, 1)) % parallel.pipeline_model_parallel_size:
        yield (
            "parallel.virtual_pipeline_model_parallel_size: the number of micro-batches per step, "
            f"{training.global_batch_size // rows}, must be a multiple of the {parallel.pipeline_model_parallel_size} stages"
        )
    if run.data.packing and training.micro_batch_size != 1:
        yield (
            f"training.micro_batch_size={training.micro_batch_size}: a packed micro-batch is one row; use 1 and a longer "
            "data.seq_length, or data.packing=false"
        )
    if run.data.packing and run.data.sampler == "modality_length":
        yield "data.sampler=modality_length orders padded batches; set data.packing=false"


def _training(run: RunConfig) -> Iterator[str]:
    training = run.training
    for role in training.trains or ():
        if role not in ROLES:
            yield f"training.trains: {role!r} is not a role; roles are {', '.join(ROLES)}"
    if training.fp8_recipe is not None:
        yield from _fp8(run)
    if run.optimizer.overlap_param_gather and run.optimizer.overlap_grad_reduce is False:
        yield "optimizer.overlap_param_gather=true needs overlap_grad_reduce; set it to true as well, or leave both unset"
    if training.train_steps < 0:
        yield f"training.train_steps={training.train_steps} must be 0 (one epoch) or positive"
    if not 0 <= run.optimizer.lr_warmup_fraction <= 1:
        yield f"optimizer.lr_warmup_fraction={run.optimizer.lr_warmup_fraction} must lie between 0 and 1"
    router_warmup = run.optimizer.router_lr_warmup_fraction
    if router_warmup is not None and not 0 <= router_warmup <= 1:
        yield f"optimizer.router_lr_warmup_fraction={router_warmup} must lie between 0 and 1, or be left unset"
    if router_warmup is not None and run.moe is None:
        yield f"optimizer.router_lr_warmup_fraction={router_warmup} needs a MoE model; leave it unset"
    if run.logging.routing_interval < 1:
        yield f"logging.routing_interval={run.logging.routing_interval} must be at least 1 step"
    if run.logging.straggler_interval < 0:
        yield f"logging.straggler_interval={run.logging.straggler_interval} must be 0 (never) or a number of steps"
    minutes = run.parallel.distributed_timeout_minutes
    if minutes <= 0:
        yield f"parallel.distributed_timeout_minutes={minutes} must be positive; it must outlast the slowest checkpoint"


def _fp8(run: RunConfig) -> Iterator[str]:
    training = run.training
    if platform.HAS_CUDA and not platform.HAS_TRANSFORMER_ENGINE:
        yield (
            f"training.fp8_recipe={training.fp8_recipe} needs Transformer Engine on a GPU (on a CPU it is emulated); "
            "leave it unset"
        )
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if (count := getattr(training, name)) and training.fp8_recipe == "delayed":
            yield f"training.{name}={count}: Megatron-Core's delayed recipe covers all layers; use tensorwise or 0"
    multiple = run.row_multiple
    if run.data.seq_length % multiple:
        yield (
            f"data.seq_length={run.data.seq_length} must be a multiple of {multiple} for "
            f"training.fp8_recipe={training.fp8_recipe}"
        )


def _divisors(number: int) -> str:
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= 64]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]
