"""What each number of a run may be by itself, as one table."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from megatron_moellava.config import RolesConfig, RunConfig

Rule = tuple[Callable[[float], bool], str]
AT_LEAST_0: Rule = (lambda value: 0 <= value < float("inf"), "must be 0 or more")
AT_LEAST_1: Rule = (lambda value: value >= 1, "must be at least 1")
POSITIVE: Rule = (lambda value: 0 < value < float("inf"), "must be positive")
SHARE: Rule = (lambda value: 0 <= value <= 1, "must lie between 0 and 1")
BELOW_1: Rule = (lambda value: 0 <= value < 1, "must be at least 0 and below 1")

# A field that is None is unset, which is always right where its type allows it.
RULES: dict[str, Rule] = {
    "moe.num_moe_experts": AT_LEAST_1,
    "moe.moe_ffn_hidden_size": AT_LEAST_1,
    "moe.moe_router_topk_scaling_factor": POSITIVE,
    "moe.moe_router_num_groups": AT_LEAST_1,
    "moe.moe_router_group_topk": AT_LEAST_1,
    "moe.expert_groups.image": AT_LEAST_0,
    "moe.expert_groups.text": AT_LEAST_0,
    "moe.expert_groups.shared": AT_LEAST_0,
    "moe.expert_groups.penalty": POSITIVE,
    "moe.moe_aux_loss_coeff": AT_LEAST_0,
    "moe.moe_z_loss_coeff": AT_LEAST_0,
    "moe.moe_router_bias_update_rate": AT_LEAST_0,
    "moe.moe_shared_expert_intermediate_size": AT_LEAST_1,
    "moe.moe_expert_capacity_factor": POSITIVE,
    "moe.eval_capacity_factor": POSITIVE,
    **{
        f"{section}.{name}": rule
        for section in ("tower_moe", "projector_moe")
        for name, rule in (
            ("num_moe_experts", AT_LEAST_1),
            ("moe_aux_loss_coeff", AT_LEAST_0),
            ("moe_z_loss_coeff", AT_LEAST_0),
        )
    },
    "moe.min_capacity": AT_LEAST_0,
    "data.seq_length": AT_LEAST_1,
    "data.max_sample_length": AT_LEAST_1,
    "data.max_image_tokens": AT_LEAST_1,
    "data.max_sample_image_tokens": AT_LEAST_1,
    "data.packing_buffer": AT_LEAST_1,
    "data.num_workers": (lambda value: value >= 0, "must be at least 0 (0: in the training process itself)"),
    "data.max_images": AT_LEAST_0,
    "data.video_frames": AT_LEAST_1,
    "data.video_fps": (lambda value: 0 <= value < float("inf"), "must be 0 (video_frames of each video) or positive"),
    "data.max_skip_share": (lambda value: 0 <= value < 1, "must lie between 0 (stop at the first bad row) and 1"),
    "parallel.tensor_model_parallel_size": AT_LEAST_1,
    "parallel.pipeline_model_parallel_size": AT_LEAST_1,
    "parallel.virtual_pipeline_model_parallel_size": AT_LEAST_1,
    "parallel.context_parallel_size": AT_LEAST_1,
    "parallel.expert_model_parallel_size": AT_LEAST_1,
    "parallel.expert_tensor_parallel_size": AT_LEAST_1,
    "parallel.distributed_timeout_minutes": (
        POSITIVE[0],
        "must be positive; it must outlast the slowest checkpoint",
    ),
    "training.train_steps": (lambda value: value >= 0, "must be 0 (one epoch) or positive"),
    "training.micro_batch_size": AT_LEAST_1,
    "training.global_batch_size": AT_LEAST_1,
    "training.num_layers_at_start_in_bf16": AT_LEAST_0,
    "training.num_layers_at_end_in_bf16": AT_LEAST_0,
    "training.non_finite_patience": AT_LEAST_1,
    "training.lora.rank": AT_LEAST_1,
    "training.lora.alpha": POSITIVE,
    "training.lora.dropout": BELOW_1,
    "training.distillation.weight": SHARE,
    "training.distillation.temperature": POSITIVE,
    "preference.beta": POSITIVE,
    "preference.loss_coeff": AT_LEAST_0,
    "preference.quality_coeff": AT_LEAST_0,
    "preference.sft_coeff": AT_LEAST_0,
    "optimizer.lr": AT_LEAST_0,
    "optimizer.min_lr": AT_LEAST_0,
    "optimizer.projector_lr": AT_LEAST_0,
    **{
        f"optimizer.roles.{part.name}.{name}": AT_LEAST_0
        for part in dataclasses.fields(RolesConfig)
        for name in ("lr", "min_lr", "weight_decay")
    },
    "optimizer.lr_wsd_decay_iters": (AT_LEAST_1[0], "must be at least 1 step"),
    "optimizer.lr_warmup_fraction": SHARE,
    "optimizer.router_lr_warmup_fraction": (SHARE[0], "must lie between 0 and 1, or be left unset"),
    "optimizer.weight_decay": AT_LEAST_0,
    "optimizer.adam_beta1": BELOW_1,
    "optimizer.adam_beta2": BELOW_1,
    "optimizer.adam_eps": POSITIVE,
    "optimizer.muon_momentum": BELOW_1,
    "optimizer.muon_extra_scale_factor": POSITIVE,
    "optimizer.muon_num_ns_steps": AT_LEAST_1,
    "optimizer.ema_decay": (lambda value: 0 < value < 1, "must lie between 0 and 1, or be left unset"),
    "optimizer.clip_grad": (AT_LEAST_0[0], "must be 0 (off) or positive"),
    "optimizer.initial_loss_scale": POSITIVE,
    "optimizer.min_loss_scale": POSITIVE,
    "optimizer.loss_scale_window": AT_LEAST_1,
    "optimizer.hysteresis": AT_LEAST_1,
    "checkpoint.ckpt_step": AT_LEAST_1,
    "checkpoint.save_interval": (AT_LEAST_1[0], "must be at least 1 step"),
    "validation.interval": (AT_LEAST_1[0], "must be at least 1 step"),
    "validation.steps": (lambda value: value >= 0, "must not be negative; 0 reads all rows"),
    "checkpoint.place_experts": (
        lambda value: 0 < value < 1,
        "must be a share above 0 and below 1, such as 0.05, or be left unset",
    ),
    "checkpoint.keep": (AT_LEAST_1[0], "must be at least 1; the newest checkpoint is never deleted"),
    "logging.log_interval": (AT_LEAST_1[0], "must be at least 1 step"),
    "logging.routing_interval": (AT_LEAST_1[0], "must be at least 1 step"),
    "logging.max_activations_interval": (lambda value: value >= 0, "must be 0 (never) or a number of steps"),
    "logging.straggler_interval": (lambda value: value >= 0, "must be 0 (never) or a number of steps"),
}


def _field(section: Any, name: str) -> Any:
    return getattr(section, name, None)


def number_problems(run: RunConfig) -> Iterator[str]:
    """Numbers that are wrong whatever the others are."""
    for path, (is_legal, rule) in RULES.items():
        value: Any = functools.reduce(_field, path.split("."), run)
        if value is not None and not is_legal(value):
            yield f"{path}={value} {rule}"
