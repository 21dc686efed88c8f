"""Batches, schedules and precision."""

import dataclasses
import math
from collections.abc import Iterator

from megatron_moellava.config import OptimizerConfig, RunConfig
from megatron_moellava.machine import COMPILER, TRANSFORMER_IMPL, Machine, is_installed
from megatron_moellava.stages import part_of, trained_roles

BLACKWELL = (10, 0)  # compute capability


def batch_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Rows per step, and how they are divided."""
    training, parallel = run.training, run.parallel
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    rows = training.micro_batch_size * max(world_size // model, 1)
    if training.global_batch_size % rows:
        yield (
            f"training.global_batch_size={training.global_batch_size} must be a multiple of micro_batch_size "
            f"{training.micro_batch_size} x data-parallel ranks {max(world_size // model, 1)} = {rows}"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual and (training.global_batch_size // rows) % parallel.pipeline_model_parallel_size:
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


def training_problems(run: RunConfig, machine: Machine) -> Iterator[str]:
    """Device, precision, and what the optimizer's numbers need of each other."""
    training = run.training
    if training.device == "cuda" and not machine.has_gpu:
        yield "training.device=cuda: torch finds no GPU here; use auto or cpu, or look at CUDA_VISIBLE_DEVICES and the driver"
    if training.device == "cpu" and machine.has_gpu:
        yield "training.device=cpu: this process has its GPU already; start it with CUDA_VISIBLE_DEVICES= as well"
    if training.transformer_impl == "transformer_engine" and not machine.has_transformer_engine:
        yield (
            "training.transformer_impl=transformer_engine: there is no GPU here, or Transformer Engine is not (wholly) "
            "installed; use auto or local"
        )
    if training.transformer_impl == "local" and machine.has_transformer_engine:
        yield (
            "training.transformer_impl=local: this process has loaded Transformer Engine already; start it with "
            f"{TRANSFORMER_IMPL}=local as well"
        )
    if training.compile and not machine.has_compiler:
        yield (
            f"training.compile=true: there is no C++ compiler ({COMPILER}) here for torch.compile; install one (apt-get "
            "install g++), name it in the variable CXX, or set training.compile=false"
        )
    if training.trains == () and training.lora is None:
        yield "training.trains is empty, so nothing would be trained; name roles, or leave it unset for the stage's own"
    if training.fp8_recipe is not None:
        yield from _fp8(run, machine)
    yield from _sixteen_bits(run)
    if run.optimizer.overlap_param_gather and run.optimizer.overlap_grad_reduce is False:
        yield "optimizer.overlap_param_gather=true needs overlap_grad_reduce; set it to true as well, or leave both unset"
    optimizer = run.optimizer
    if optimizer.gradient_accumulation_fusion and not machine.has_gradient_fusion:
        yield "optimizer.gradient_accumulation_fusion=true needs Transformer Engine and apex's kernel on a GPU; leave it unset"
    yield from rate_problems(run)
    if optimizer.optimizer == "muon":
        yield from _muon(run)
    else:
        usual = OptimizerConfig()
        for name in (item.name for item in dataclasses.fields(usual) if item.name.startswith("muon_")):
            if (value := getattr(optimizer, name)) != getattr(usual, name):
                yield f"optimizer.{name}={value} is about optimizer.optimizer=muon, and this run has adam; leave it out"
    if run.validation.ema and optimizer.ema_decay is None:
        yield "validation.ema=true: there are no averaged weights; set optimizer.ema_decay, e.g. 0.999, or leave it out"
    if optimizer.router_lr_warmup_fraction is not None and not run.mixtures:
        yield f"optimizer.router_lr_warmup_fraction={optimizer.router_lr_warmup_fraction} needs a MoE model; leave it unset"


def rate_problems(run: RunConfig) -> Iterator[str]:
    """Learning rates and their schedule; those of parts of the model must be about something that is trained."""
    optimizer, parts = run.optimizer, run.optimizer.of_roles()
    if optimizer.lr == 0 and not any(own.lr for own in parts.values()):
        yield "optimizer.lr=0: no step would change anything; set a rate above 0, or one of a part (optimizer.roles)"
    rates = {"lr": (optimizer.lr, optimizer.min_lr), "projector_lr": (optimizer.projector_lr, optimizer.min_lr)}
    for part, own in parts.items():
        if own.lr is not None or own.min_lr is not None:
            lowest = optimizer.min_lr if own.min_lr is None else own.min_lr
            rates[f"roles.{part}.lr"] = optimizer.lr if own.lr is None else own.lr, lowest
    if optimizer.projector_lr is not None:
        del rates["roles.projector.lr"]
    for name, (rate, lowest) in rates.items():
        if rate is not None and rate < lowest:
            yield f"optimizer.min_lr={lowest} is more than optimizer.{name}={rate}; it is where the rate decays to"
    roles = optimizer.roles
    if optimizer.projector_lr is not None and roles and roles.projector and roles.projector.lr is not None:
        yield (
            f"optimizer.projector_lr={optimizer.projector_lr} and optimizer.roles.projector.lr={roles.projector.lr} are the "
            "same rate; drop one"
        )
    trained = {part_of(role) for role in trained_roles(run.training)}
    for part in parts:
        if part not in trained and not (part == "projector" and roles is None):
            yield (
                f"optimizer.roles.{part}: this run does not train it (training.trains, training.lora); it trains "
                f"{', '.join(sorted(trained))}; leave it out"
            )
    if optimizer.lr_wsd_decay_iters is not None and optimizer.lr_decay_style != "WSD":
        yield (
            f"optimizer.lr_wsd_decay_iters={optimizer.lr_wsd_decay_iters} is the cooldown of optimizer.lr_decay_style=WSD, "
            f"and this run has {optimizer.lr_decay_style}; leave it unset"
        )
    if run.training.train_steps > 0 and (problem := cooldown_problem(run, run.training.train_steps)):
        yield problem


def _muon(run: RunConfig) -> Iterator[str]:
    """What Muon needs, and what it does not go together with."""
    if not is_installed("emerging_optimizers"):
        yield (
            "optimizer.optimizer=muon needs the package emerging-optimizers; pip install 'megatron-moellava[muon]', or use adam"
        )
    options, training = run.optimizer, run.training
    refused = {
        "training.precision=fp16": (training.precision == "fp16", "Megatron-Core's Muon has no loss scale; use bf16"),
        "training.lora": (training.lora is not None, "Muon steps whole matrices, and adapters are factors; use adam"),
        "optimizer.main_params_dtype=bf16": (options.main_params_dtype == "bf16", "Muon's weights are not rounded"),
        "optimizer.ema_decay": (options.ema_decay is not None, "averages lie among AdamW's moments; use adam"),
        "optimizer.overlap_param_gather=true": (
            bool(options.overlap_param_gather),
            "Muon's ranks exchange parameters after each update; leave it unset",
        ),
    }
    for name, (is_so, why) in refused.items():
        if is_so:
            yield f"{name} does not go with optimizer.optimizer=muon: {why}"


def muon_layout_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Megatron-Core 0.19.2 divides the experts' matrices among their replicas only where the others have replicas too;
    elsewhere each would count in the gradient norm as often as it is held."""
    parallel = run.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or 1
    replicas = world_size // (expert_tensor * parallel.expert_model_parallel_size * pipeline)
    if run.optimizer.optimizer == "muon" and run.moe and world_size // (tensor * pipeline) == 1 and replicas > 1:
        yield (
            f"optimizer.optimizer=muon: with parallel.tensor_model_parallel_size={tensor} and no data parallelism, {replicas} "
            f"ranks would hold the same experts; set parallel.expert_model_parallel_size or "
            f"parallel.expert_tensor_parallel_size so that their product is {tensor}, or use adam"
        )


def cooldown_problem(run: RunConfig, train_steps: int) -> str:
    """Why WSD's warm-up and cooldown do not fit into a run of so many steps; empty where they do."""
    options = run.optimizer
    cooldown, warmup = options.wsd_decay_steps(train_steps), math.ceil(options.lr_warmup_fraction * train_steps)
    if options.lr_decay_style != "WSD" or cooldown + warmup <= train_steps:
        return ""
    return (
        f"optimizer.lr_wsd_decay_iters={cooldown} and {warmup} steps of warm-up are more than the run's {train_steps} steps; "
        f"use at most {max(train_steps - warmup, 1)}, or a smaller optimizer.lr_warmup_fraction"
    )


def tracker_problems(run: RunConfig) -> Iterator[str]:
    """`logging.trackers`: packages that are not installed, and where a run keeps the trackers' ids."""
    trackers = run.logging.trackers
    for name in trackers:
        if not is_installed(name):
            yield (
                f"logging.trackers: {name} is not installed; pip install 'megatron-moellava[trackers]' (or {name} alone), or "
                "leave it out"
            )
    if trackers and not run.logging.directory and not run.checkpoint.save:
        yield "logging.trackers needs a folder, to continue the same curves later; set logging.directory or checkpoint.save"


def profile_problems(run: RunConfig, world_size: int) -> Iterator[str]:
    """Steps and ranks of `profile`, and where what it finds shall go."""
    steps, ranks = run.profile.steps, run.profile.ranks
    if not steps:
        return
    shown = ",".join(map(str, steps))
    if len(steps) > 2 or steps[0] < 1 or steps[-1] < steps[0]:
        yield f"profile.steps=[{shown}] must be the first and the last step, from 1 on, or one step alone"
    elif 0 < run.training.train_steps < steps[-1]:
        yield f"profile.steps=[{shown}]: the run ends after step {run.training.train_steps}"
    if beyond := [rank for rank in ranks if not 0 <= rank < world_size]:
        yield f"profile.ranks names {', '.join(map(str, beyond))}, and there are ranks 0 to {world_size - 1}"
    if not run.logging.directory and not run.checkpoint.save:
        yield f"profile.steps=[{shown}] needs a folder to write to; set logging.directory or checkpoint.save"


def _sixteen_bits(run: RunConfig) -> Iterator[str]:
    precision, options = run.training.precision, run.optimizer
    if precision == "fp16" and run.training.fp8_recipe is not None:
        yield (
            f"training.fp8_recipe={run.training.fp8_recipe} with training.precision=fp16: FP8's scales and the loss scale "
            "would disturb each other; use bf16"
        )
    if options.main_params_dtype == "bf16" and precision != "bf16":
        yield (
            f"optimizer.main_params_dtype=bf16 with training.precision={precision}: the weights that are stepped would have "
            "fewer bits than those that compute; use training.precision=bf16, or leave it unset"
        )
    if options.stochastic_rounding and options.main_params_dtype == "fp32":
        yield "optimizer.stochastic_rounding=true: fp32 weights are not rounded; set optimizer.main_params_dtype=bf16 as well"
    if options.min_loss_scale > options.initial_loss_scale:
        yield (
            f"optimizer.min_loss_scale={options.min_loss_scale} is more than "
            f"optimizer.initial_loss_scale={options.initial_loss_scale}"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _fp8(run: RunConfig, machine: Machine) -> Iterator[str]:
    training = run.training
    if machine.has_gpu and not machine.has_transformer_engine:
        yield (
            f"training.fp8_recipe={training.fp8_recipe} needs Transformer Engine on a GPU (on a CPU it is emulated); "
            "leave it unset"
        )
    capability = machine.compute_capability or BLACKWELL
    if training.fp8_recipe == "mxfp8" and capability < BLACKWELL:
        yield (
            f"training.fp8_recipe=mxfp8 needs a GPU of compute capability {_dotted(BLACKWELL)} (Blackwell), and this one has "
            f"{_dotted(capability)}; use blockwise"
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
