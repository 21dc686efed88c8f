"""Batches, schedules and precision."""

from collections.abc import Iterator

from megatron_moellava.config import RunConfig
from megatron_moellava.machine import TRANSFORMER_IMPL, Machine

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
    if optimizer.lr == 0 and not optimizer.projector_lr:
        yield "optimizer.lr=0: no step would change anything; set a rate above 0, or optimizer.projector_lr"
    for name in ("lr", "projector_lr"):
        if (rate := getattr(optimizer, name)) is not None and rate < optimizer.min_lr:
            yield f"optimizer.min_lr={optimizer.min_lr} is more than optimizer.{name}={rate}; it is where the rate decays to"
    if optimizer.router_lr_warmup_fraction is not None and run.moe is None:
        yield f"optimizer.router_lr_warmup_fraction={optimizer.router_lr_warmup_fraction} needs a MoE model; leave it unset"


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
