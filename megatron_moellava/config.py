"""One run as data: frozen dataclasses, loaded from YAML and dotted overrides.

Free of torch, so that `--help` and `--validate-only` answer at once. Field names are Megatron-Core's wherever
Megatron-Core has the thing, so that a search finds both sides. A field's type says which values are legal, and nothing
else does; the rules that tie fields together (divisibility, files, backbone limits) are in `validation/`.
docs/reference/configuration.md is made of this file: docstrings, types, defaults, and the comment of each field.
"""

import dataclasses
import functools
import math
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from megatron_moellava import typed_tree
from megatron_moellava.machine import Device, TransformerImpl


class MoELlavaError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 2


class ConfigError(MoELlavaError):
    """The run as asked for cannot work; says field, value, rule and fix."""


class CheckpointError(MoELlavaError):
    """A checkpoint is missing, incomplete, damaged or of another model."""


class DataError(MoELlavaError):
    """A data set is missing or a sample is malformed; says file, row and fix."""


# Legal values that have a name, because more than one field or a command has them; `typing.get_args` lists them.
Stage = Literal[1, 2, 3, 4]
Precision = Literal["auto", "bf16", "fp16", "fp32"]  # auto: bf16 where the machine multiplies in it, else fp32
Recompute = Literal["none", "full", "selective", "moe_act", "moe"]
Placement = Literal["first_half", "second_half", "sparse", "dense"]
Role = Literal[
    "tower",
    "projector",
    "language.embedding",  # word embeddings and output layer
    "language.attention",
    "language.norm",
    "language.ffn",  # FFN of the dense layers, and the dense FFN beside the experts of a residual MoE
    "experts",
    "router",  # and the mixing coefficient of a residual MoE
]
Component = Literal["language", "tower", "projector"]  # what may have experts
Tracker = Literal["wandb", "mlflow", "swanlab"]
BoxFormatName = Literal["thousand", "llava", "qwen", "qwen_vl"]
LoraTarget = Literal["attention", "ffn", "experts", "router", "projector", "tower"]
Levels = Literal["uint8", "uint12", "uint16", "int16", "uint32", "int32", "float", "colours"]
PictureFormat = Literal["PNG", "TIFF", "PPM", "JPEG", "WEBP", "GIF", "BMP"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One data set of `data.sources`."""

    path: str  # LLaVA JSON or JSONL, or a folder of WebDataset shards
    image_folder: str = ""  # image paths of the rows are relative to it
    weight: float = 1.0  # how often each row is seen in an epoch; 1.0 for all: their concatenation, as LLaVA does


@dataclass(frozen=True, kw_only=True, slots=True)
class Channel:
    """How a channel shows a quantity: from level 0 at `black` to level 255 at `white`; what lies beyond them is clipped."""

    black: float  # a quantity; larger than `white`: the channel is inverted
    white: float
    # of the quantity: log and reciprocal see small ones finer (reciprocal of a depth: like a disparity)
    curve: Literal["linear", "log", "reciprocal"] = "linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Modality:
    """A kind of pictures beside the plain ones of `image`, such as depth or thermal, in `data.modalities`."""

    name: str  # the key of a row that names such pictures; `<name>` stands for each in the text
    levels: Levels  # what the files hold: grey levels of this type, or colours, which are read as plain pictures
    formats: tuple[PictureFormat, ...] = ()  # of the files; empty: PNG and TIFF, of colours all
    scale: float = 1.0  # quantity = level * scale + offset: 0.001 makes metres of millimetres
    offset: float = 0.0
    missing: tuple[float, ...] = ()  # levels that mean "not measured"; NaN always does
    missing_shown: int = 0  # the level of 0 to 255 that shows them
    channels: tuple[Channel, ...] = ()  # how the quantity becomes red, green and blue: one for all three, or three
    tower: str = ""  # of its own: a name in towers/, or a folder with a config.json; empty: model.tower
    projector: Literal["shared", "own"] = "shared"  # own: which a tower whose features are of another width needs

    @property
    def is_apart(self) -> bool:
        """Whether its pictures have a tower or a projector of their own on their way to the language model."""
        return bool(self.tower) or self.projector == "own"

    @property
    def placeholder(self) -> str:
        """What stands for one of its pictures in the text."""
        return f"<{self.name}>"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which language model and which vision tower; `checkpoint.load` brings both along."""

    backbone: str  # a name in backbones/, or a folder with a Hugging Face config.json
    tower: str = "clip-vit-large-patch14-336"  # a name in towers/, or a folder with a config.json
    # MiniCPM: False reproduces the original, which skips scale_emb with images
    scale_multimodal_embeddings: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroups:
    """The experts of every MoE layer by modality: a token chooses among those of its own and the shared ones."""

    image: int  # experts of visual tokens
    text: int  # experts of all other tokens
    shared: int = 0  # experts of both
    # which expert is whose, by index. binned: image, shared, text, so that the experts of one modality are neighbours, on as
    # few expert-parallel ranks as can be; dealt: in turn, so that every rank has some of each
    order: Literal["binned", "dealt"] = "binned"
    # None: a token has no other experts; else their logits are lower by so much, and it may still choose them
    penalty: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The experts: how many, where, and how tokens are routed to them; null for a dense model."""

    num_moe_experts: int = 4  # per MoE layer
    moe_router_topk: int = 2  # experts per token
    placement: Placement | tuple[int, ...] = "sparse"  # by name (sparse: layers 0, 2, 4, ...), or layer numbers
    moe_ffn_hidden_size: int | None = None  # width of each expert; None: the dense FFN's
    # "megatron": dropless deterministic top-k; "original": the DeepSpeed 0.9.5 gate
    router: Literal["megatron", "original"] = "megatron"
    # of the router's logits and choices; "bf16" as a plain 16-bit model has them
    moe_router_dtype: Literal["fp32", "bf16"] = "fp32"
    # top-1: the weight is 1, with the gradient of its log-probability; False: the probability itself (megatron router only)
    normalize_top1: bool = False
    # softmax over all experts before the choice: the weights of several chosen experts do not sum to 1 (megatron router only)
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None  # of the weights of the chosen experts (megatron router only)
    # the experts in so many groups; only those of the best moe_router_group_topk groups are chosen among (megatron router only)
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None  # groups by their best moe_router_topk / moe_router_group_topk experts
    # which experts are of images, of text, and of both; null: every token chooses among all (megatron router only)
    expert_groups: ExpertGroups | None = None
    moe_aux_loss_coeff: float = 0.01  # per MoE layer, summed over layers
    moe_z_loss_coeff: float | None = None  # megatron router only
    # megatron router only
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] = "aux_loss"
    # the balancing loss over image tokens and over text tokens, each apart, times their shares (megatron router only)
    balance_per_modality: bool = False
    moe_router_enable_expert_bias: bool = False  # aux-loss-free balancing (megatron router)
    moe_router_bias_update_rate: float = 1e-3  # step of the expert bias
    moe_shared_expert_intermediate_size: int | None = None  # of an expert that sees every token; None: there is none
    moe_shared_expert_gate: bool = False  # its output is weighted by the sigmoid of a learned product with the token
    # slots per expert = ceil(tokens / experts * factor * top-k); None: dropless
    moe_expert_capacity_factor: float | None = None
    eval_capacity_factor: float = 2.0  # original router only
    min_capacity: int = 0  # original router only
    second_choice: Literal["sampled", "deterministic"] = "sampled"  # original router; sampled: with Gumbel noise
    aux_loss_gradient: bool = True  # False reproduces the released recipes, whose aux loss has no gradient
    use_residual: bool = False  # residual MoE: the dense FFN stays beside the experts, mixed by a learned coefficient
    moe_grouped_gemm: bool = True  # one product for all experts of a rank; False: one after the other
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"  # flex: DeepEP, on GPUs
    moe_router_padding_for_quantization: bool = False  # FP8 on a GPU: the router fills experts up, instead of zero rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorMoEConfig:
    """Experts in the projector's place, each a projector of its own (CuMo, arXiv 2405.05949); null for a dense projector."""

    num_moe_experts: int = 4
    moe_router_topk: int = 2  # experts per token
    normalize_top1: bool = False  # top-1: the weight is 1, with the gradient of its log-probability
    moe_aux_loss_coeff: float = 0.1  # 0: the loss is logged and has no gradient
    moe_z_loss_coeff: float | None = 0.01  # None: there is none
    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"  # of a micro-batch's images together

    @property
    def mixture(self) -> MoEConfig:
        """The same as the language model's experts would have it; the router is Megatron-Core's."""
        return MoEConfig(
            **{"placement": (0,)} | {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerMoEConfig(ProjectorMoEConfig):
    """Experts in the place of the vision tower's FFNs (CuMo, arXiv 2405.05949); null for a dense tower."""

    num_moe_experts: int = 4  # per MoE layer
    # of the tower's layers that features need: by name (sparse: layers 0, 2, 4, ...), or layer numbers
    placement: Placement | tuple[int, ...] = "dense"
    moe_aux_loss_coeff: float = 0.1  # per MoE layer, summed over layers


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read, and how rows are made of it."""

    sources: tuple[Source, ...] = ()
    tokenizer: str = ""  # folder with a Hugging Face tokenizer, or a SentencePiece .model
    template: str = ""  # conversation version; empty: the backbone's own
    # "spans": by construction; "original": the original's algorithm with its failures
    label_mode: Literal["spans", "original"] = "spans"
    # "pad" to a square with the mean colour, or "square" (resize and crop)
    image_aspect_ratio: Literal["pad", "square"] = "pad"
    image_grid: bool = False  # LLaVA-NeXT tiling of high-resolution images
    # towers at native resolution: visual tokens of one picture; None: the tower's own
    max_image_tokens: int | None = None
    max_sample_image_tokens: int | None = None  # likewise, of all pictures of a sample; None: no limit of its own
    # likewise: small pictures are enlarged to the budget; False: no more tokens than pixels fill
    enlarge_images: bool = True
    # kinds of pictures beside `image`, by the key of a row that names them: depth, thermal, ... (below)
    modalities: tuple[Modality, ...] = ()
    # how the text says where something is: 0 to 999 of what the tower sees, and others (docs/reference/data.md)
    box_format: BoxFormatName = "thousand"
    video_frames: int = 8  # shown of a video, spread evenly; with video_fps the most
    video_fps: float = 0.0  # frames shown for each second of a video, up to video_frames; 0: video_frames of any video
    video_times: Literal["none", "seconds"] = "none"  # whether the text says when each frame is
    # visual tokens of a video's frames averaged in blocks: 2 x 2 neighbours, and of two frames
    video_pooling: Literal["none", "2x2", "2x2x2"] = "none"
    seq_length: int = 2048  # tokens per row, image tokens included
    # of one sample; None: seq_length, or the backbone's context where that is shorter
    max_sample_length: int | None = None
    # max_sample_length: "positions", images included, or "text", the original's rule
    length_counts: Literal["positions", "text"] = "positions"
    # samples beyond it: "cut" there and count, as the original, or "skip" them as bad
    long_samples: Literal["cut", "skip"] = "cut"
    packing: bool = True  # several samples per row, with block-diagonal attention
    packing_buffer: int = 128  # samples the packer looks at
    sampler: Literal["shuffle", "modality_length"] = "shuffle"  # modality_length: the original's (padded mode only)
    num_workers: int = 2  # processes per data-parallel rank that read ahead
    max_images: int = 16  # per sample
    ignore_keys: tuple[str, ...] = ()  # keys of rows that are passed over; any other unknown key makes a row bad
    trust_paths: bool = False  # pictures may lie anywhere: absolute names, `..`, links out of the image folder
    max_skip_share: float = 0.0  # bad rows tolerated, as a share of the data set's; 0 stops at the first


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model and the batch are divided over the processes; what is left over is data parallelism."""

    tensor_model_parallel_size: int = 1  # processes that share each layer's matrices
    pipeline_model_parallel_size: int = 1  # groups of layers, one after the other
    virtual_pipeline_model_parallel_size: int | None = None  # chunks of layers per stage: an interleaved pipeline
    num_layers_in_first_pipeline_stage: int | None = None  # fewer decoder layers beside the vision tower
    # "cost": level with the tower; or the layers of each (virtual) stage
    pipeline_split: Literal["even", "cost"] | tuple[int, ...] = "even"
    context_parallel_size: int = 1  # processes that share the positions of a row
    expert_model_parallel_size: int = 1  # processes that share the experts of a layer
    expert_tensor_parallel_size: int | None = None  # None: 1 for MoE, so that each expert is whole
    sequence_parallel: bool | None = None  # None: on when tensor_model_parallel_size > 1
    distributed_timeout_minutes: float = 10.0  # without progress; then a run names the rank that hangs, and ends with 4

    @property
    def sequence_multiple(self) -> int:
        """Rows must have a multiple of so many tokens: sequence parallelism, and two chunks per context-parallel rank."""
        chunks = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        return self.tensor_model_parallel_size * chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (LoRA) beside frozen matrices: W x + scale * B A x, one for each projection, as `peft` makes them."""

    rank: int = 16  # rows of A, columns of B
    alpha: float = 32.0  # scale = alpha / rank
    dropout: float = 0.0  # of what enters A
    # which matrices, by role; None: attention, ffn and experts, as far as the model has them
    targets: tuple[LoraTarget, ...] | None = None
    use_rslora: bool = False  # scale = alpha / sqrt(rank)
    # the matrices of the experts' adapters that face the hidden states (A of fc1, B of fc2) are one for all experts of a layer
    shared_outer: bool = False

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Stages 2 and 3: learn the whole distribution that a teacher has for each token of the answers, beside the token."""

    teacher_logits: str  # folder that `moellava make-teacher` has written of the same rows with the same tokenizer
    # of the divergence KL(teacher, student); the loss of the tokens themselves has the rest, 1 - weight
    weight: float = 0.5
    temperature: float = 1.0  # both distributions are flattened by it, and the divergence is multiplied by its square


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Switches that cost time, for a run that misbehaves."""

    # kernels whose result is the same each time; an operation without one is named in a warning
    deterministic: bool = False
    # the forward operation behind a gradient that is NaN, with its traceback; ends the run
    detect_anomaly: bool = False
    # the first module whose output or gradient is not finite, named where a step is skipped
    find_non_finite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The stage, its steps and batches, and the numbers it computes in."""

    stage: Stage  # 1 projector, 2 projector + language model, 3 MoE, 4 preferences
    train_steps: int = 0  # optimizer steps; 0: one epoch
    micro_batch_size: int = 1  # rows per forward pass and data-parallel rank; 1 when packing
    global_batch_size: int = 128  # rows per optimizer step, over all data-parallel ranks
    seed: int = 42  # of new weights, of dropout and noise, and of the data's order
    # of weights and activations in the pass; the optimizer keeps fp32. auto: bf16 on GPUs and CPUs with units for it
    precision: Precision = "auto"
    # on a CPU the recipe's numerics are emulated
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    num_layers_at_start_in_bf16: int = 0  # decoder layers that stay out of FP8 (not with the delayed recipe)
    num_layers_at_end_in_bf16: int = 0  # likewise
    device: Device = "auto"  # "cuda": a machine without a GPU is an error
    transformer_impl: TransformerImpl = "auto"  # modules on a GPU; auto: Transformer Engine's where it is installed
    # roles that receive gradients; None: the stage's own, and beside adapters the projector (stage 3: and the router)
    trains: tuple[Role, ...] | None = None
    lora: LoraConfig | None = None  # low-rank adapters beside frozen matrices (below); null: none
    distillation: DistillationConfig | None = None  # from a teacher's logits (below); null: none
    recompute: Recompute = "none"  # selective: the attention alone; moe_act: the activation of grouped experts alone
    recompute_tower: bool = False  # the vision tower's activations too
    # torch.compile for norms, rotary embedding and activations: half a minute at first, 3 seconds in later runs of the
    # same sizes, less time per step. On a CPU it needs a C++ compiler; Transformer Engine's modules have kernels of their own
    compile: bool = False
    non_finite_patience: int = 5  # consecutive skipped steps before the run stops
    debug: DebugConfig | None = None  # switches that cost time, for a run that misbehaves (below); null: none


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleOptions:
    """What the optimizer does otherwise for one part of the model; what is unset is as for all."""

    lr: float | None = None  # None: optimizer.lr
    min_lr: float | None = None  # None: optimizer.min_lr
    weight_decay: float | None = None  # of matrices; None: optimizer.weight_decay


@dataclass(frozen=True, kw_only=True, slots=True)
class RolesConfig:
    """Rates and weight decay by part of the model, e.g. `optimizer.roles.experts.lr=1e-4`; null: as for all."""

    tower: RoleOptions | None = None  # the vision tower
    projector: RoleOptions | None = None
    language: RoleOptions | None = None  # all roles language.*
    experts: RoleOptions | None = None
    router: RoleOptions | None = None  # and the mixing coefficient of a residual MoE
    adapters: RoleOptions | None = None  # of training.lora


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceConfig:
    """Stage 4: what makes the chosen answer of a pair likelier than the rejected one, by how a reference has them."""

    loss: Literal["dpo", "ipo", "kto"] = "dpo"  # of a pair
    beta: float = 0.1  # how dear it is to go away from the reference (IPO: its tau)
    loss_coeff: float = 1.0  # of `loss` (MPO: 0.8)
    quality_coeff: float = 0.0  # of MPO's quality term, which judges each answer by itself (MPO: 0.2)
    sft_coeff: float = 0.0  # of the mean loss of the chosen answers' tokens (MPO: 1.0)
    reference: str | None = None  # checkpoint whose log-probabilities are compared with; None: checkpoint.load
    # file with them: read where it is there and of this reference and these rows, written where not; None: beside the data
    log_probs: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW or Muon, learning rates, and how their communication overlaps with computation."""

    # muon: of matrices (arXiv 2502.16982), AdamW of the rest; needs the package emerging-optimizers
    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = 2e-5  # the highest learning rate
    min_lr: float = 0.0  # at the last step
    projector_lr: float | None = None  # None: lr
    roles: RolesConfig | None = None  # other rates and weight decay for parts of the model (below)
    # WSD: constant until a cooldown at the end of the run; inverse-square-root: of the steps, after the warm-up
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD", "inverse-square-root"] = "cosine"
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"  # of WSD's cooldown
    lr_wsd_decay_iters: int | None = None  # steps of WSD's cooldown; None: a tenth of train_steps
    lr_warmup_fraction: float = 0.03  # of train_steps
    router_lr_warmup_fraction: float | None = None  # of train_steps, for the routers alone; None: lr_warmup_fraction
    weight_decay: float = 0.0  # of matrices; biases and norms have none
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_nesterov: bool = False
    # of an update, from the matrix's shape: spectral sqrt(max(rows, columns)), unit_rms_norm sqrt(rows / columns),
    # shape_scaling sqrt(max(1, rows / columns))
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    muon_extra_scale_factor: float = 1.0  # 0.2 gives updates the size of AdamW's, so that AdamW's rates fit
    muon_num_ns_steps: int = 5  # Newton-Schulz steps of an orthogonalization
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"  # of their products; medium: bf16
    # average the weights beside the training, for evaluation (EMA); at most so much of it stays with an update; None: do not
    ema_decay: float | None = None
    clip_grad: float = 1.0  # global gradient norm; 0: off, as the original in effect
    # of the weights that Adam steps; bf16: rounded after each update, as where there is no fp32 copy (same memory)
    main_params_dtype: Literal["fp32", "bf16"] = "fp32"
    stochastic_rounding: bool = False  # of such weights; False: to the nearest
    initial_loss_scale: float = 2.0**16  # fp16; Megatron-Core's own 2**32 costs the first 16 steps
    min_loss_scale: float = 1.0  # fp16
    loss_scale_window: int = 1000  # fp16: steps without overflow before the scale doubles
    hysteresis: int = 2  # fp16: overflows before the scale halves; more wait for the next doubling
    overlap_grad_reduce: bool | None = None  # during the backward pass; None: on GPUs with several data-parallel ranks
    overlap_param_gather: bool | None = None  # during the forward pass; likewise, and only with overlap_grad_reduce
    gradient_accumulation_fusion: bool | None = (
        None  # None: in Transformer Engine's layers; with apex's kernel everywhere
    )

    def wsd_decay_steps(self, train_steps: int) -> int:
        """Steps of WSD's cooldown in a run of so many."""
        return math.ceil(train_steps / 10) if self.lr_wsd_decay_iters is None else self.lr_wsd_decay_iters

    def of_roles(self) -> dict[str, RoleOptions]:
        """What differs from the others, by the part of the model (a field of RolesConfig)."""
        roles = self.roles or RolesConfig()
        found = {item.name: getattr(roles, item.name) for item in dataclasses.fields(roles)}
        if self.projector_lr is not None:
            found["projector"] = dataclasses.replace(found["projector"] or RoleOptions(), lr=self.projector_lr)
        return {name: options for name, options in found.items() if options not in (None, RoleOptions())}

    def overlaps(self, pays: bool) -> tuple[bool, bool]:
        """(overlap_grad_reduce, overlap_param_gather) as asked for, or where it `pays`."""
        grads = pays if self.overlap_grad_reduce is None else self.overlap_grad_reduce
        pays = pays and self.optimizer == "adam"  # Muon's ranks exchange parameters after each update
        return grads, (pays and grads) if self.overlap_param_gather is None else self.overlap_param_gather


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where a stage starts from and where it writes to."""

    load: str | None = None  # where the stage starts from, unless `save` already holds a checkpoint
    save: str | None = None  # resumed from when it holds a complete checkpoint
    ckpt_step: int | None = None  # go on from this older step of `save`; the newer checkpoints are set aside
    save_interval: int = 1000  # steps; the end of the run is always saved
    keep: int = 2  # newest complete checkpoints kept
    async_save: bool = False  # write while the training goes on; costs the host memory of one more state
    # with a checkpoint, put experts where they take at least this share (0.05) off the busiest expert-parallel rank's load
    place_experts: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What a run says of itself, how often, and where."""

    log_interval: int = 1  # steps per log line
    routing_interval: int = 10  # steps between router statistics
    max_activations_interval: int = 0  # steps between records of each layer's largest activation and gradient; 0: never
    straggler_interval: int = 50  # steps between measurements of each rank's own work; 0: never
    sample_ids: bool = False  # write the ids of every step's samples to steps.jsonl
    tensorboard: bool = True
    directory: str | None = None  # TensorBoard and JSONL; None: inside checkpoint.save
    trackers: tuple[Tracker, ...] = ()  # the same numbers to these, each an installed package
    project: str = "moellava"  # of the trackers (MLflow: experiment)
    run_name: str | None = None  # likewise; None: the name of the folder
    offline: bool = False  # trackers write below the folder of the log alone, for their own `sync` later


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Losses on held-out data while training; without sources there are none."""

    sources: tuple[Source, ...] = ()  # like data.sources; each has a loss of its own, and weights play no part
    interval: int = 500  # steps between validations; the last step is always followed by one
    steps: int = 0  # batches of training.global_batch_size rows per source; 0: all of its rows
    best: bool = True  # keep the checkpoint with the lowest mean loss in checkpoint.save/best
    ema: bool = False  # score the averaged weights of optimizer.ema_decay too, as SOURCE/ema


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """A trace of some steps by torch's profiler, with a summary, in the folder of the log; without steps there is none."""

    steps: tuple[int, ...] = ()  # the first and the last one, or one alone
    ranks: tuple[int, ...] = (0,)  # []: all


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: what `--config` and `section.field=value` describe."""

    model: ModelConfig
    training: TrainingConfig
    moe: MoEConfig | None = None  # None: dense
    tower_moe: TowerMoEConfig | None = None  # None: dense
    projector_moe: ProjectorMoEConfig | None = None  # None: dense
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def required_moe(self) -> MoEConfig:
        """For code that only MoE runs reach."""
        assert self.moe is not None
        return self.moe

    @property
    def mixtures(self) -> dict[Component, MoEConfig]:
        """The experts of each part of the model that has some."""
        vision: tuple[tuple[Component, ProjectorMoEConfig | None], ...] = (
            ("tower", self.tower_moe),
            ("projector", self.projector_moe),
        )
        found: dict[Component, MoEConfig] = {"language": self.moe} if self.moe else {}
        return found | {component: moe.mixture for component, moe in vision if moe is not None}

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of so many tokens: by the parallel layout, and by FP8 products on each rank.

        A product's own rows come in 16 (MXFP8: 32), and the share that a tensor-parallel rank keeps between products
        (sequence parallelism) in 8 (32), Transformer Engine's `assert_dim_for_fp8_exec`.
        """
        whole, shared = {None: (1, 1), "mxfp8": (32, 32)}.get(self.training.fp8_recipe, (16, 8))
        parallel = self.parallel
        fp8 = math.lcm(whole, shared * parallel.tensor_model_parallel_size) if self.training.fp8_recipe else 1
        return math.lcm(parallel.sequence_multiple, fp8 * parallel.context_parallel_size)

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches per optimizer step and data-parallel rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * data_parallel_size)


# Names that fields once had, as YAML files, command lines and checkpoints still spell them -> today's names.
RENAMED = {
    "moe.num_experts": "moe.num_moe_experts",
    "moe.capacity_factor": "moe.moe_expert_capacity_factor",
    "moe.router_dtype": "moe.moe_router_dtype",
    "moe.experts": "moe.moe_grouped_gemm",
    "training.fp8": "training.fp8_recipe",
}
RENAMED_VALUES = {"moe.experts": {"grouped": True, "sequential": False}}


def load_config(yaml_path: str | None = None, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Build a run from a YAML file and dotted overrides such as `optimizer.lr=1e-4`; overrides win.

    Raises ConfigError that lists every unknown key and every wrong type at once.
    """
    tree = read_yaml(yaml_path) if yaml_path else {}
    for override in overrides:
        set_override(tree, *split_override(override))
    return from_dict(RunConfig, tree)


def read_yaml(path: str) -> dict:
    """The mapping in a YAML file, in today's names; ConfigError when the file is missing or is something else."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; give an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read ({error.strerror}); give a YAML file") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"config file {path} holds a {type(tree).__name__}; it must map sections such as `model:`")
    return current_names(tree or {}, say_renamed)


def split_override(override: str) -> tuple[str, object]:
    """`"optimizer.lr=1e-4"` -> ("optimizer.lr", "1e-4"); the value is read as YAML. ConfigError for any other form."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.field=value, e.g. optimizer.lr=1e-4")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"override {override!r} is not valid YAML after the equals sign: {problem}") from None
    return current_name(key, value, say_renamed)


def current_names(tree: dict, say: Callable[[str, str], None] | None = None) -> dict:
    """A run as nested plain data, with today's names for the `RENAMED` ones.

    `say` hears of each (old, new). ConfigError when both are there.
    """
    tree = {section: dict(fields) if isinstance(fields, dict) else fields for section, fields in tree.items()}
    for old in RENAMED:
        section, name = old.split(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            new, value = current_name(old, tree[section].pop(name), say)
            there = tree[section].get(new.partition(".")[2], value)
            if there != value:
                raise ConfigError(f"{old} is now {new}, and both are given, with different values; drop {old}")
            set_override(tree, new, value)
    return tree


def current_name(path: str, value: object, say: Callable[[str, str], None] | None = None) -> tuple[str, object]:
    """A field's dotted path and its value as today's names have them."""
    if path not in RENAMED:
        return path, value
    if say is not None:
        say(path, RENAMED[path])
    return RENAMED[path], RENAMED_VALUES.get(path, {}).get(str(value), value)


@functools.cache
def say_renamed(old: str, new: str) -> None:
    """One note for each old spelling, on the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {old} is now {new}", file=sys.stderr, flush=True)


def set_override(tree: dict, path: str, value: object) -> None:
    """Set a dotted path in nested plain data."""
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[name] = value


def from_dict(cls: type, tree: dict):
    """A dataclass of this file from nested plain data, names, types and choices checked; `load_config` has the errors."""
    value, problems = typed_tree.build(cls, tree)
    if problems:
        raise ConfigError("\n".join(problems))
    return value


def to_dict(config) -> dict:
    """Plain nested data (JSON-able) of a config; `from_dict` reads it back."""
    return dataclasses.asdict(config)
