"""What a run may change when it goes on from its own checkpoint: one table over every field of a run.

FREE     where and how fast it runs, what it says and keeps: the same samples and, up to rounding, the same numbers.
NOTED    the numbers are other ones from here on; the run says so with both values.
REFUSED  it would be another run under the name of this one.
CONTENT  compared by what the value stands for, not by how it is spelled.

The text beside a field says why, where the name alone does not; NOTED and REFUSED ones are shown with it.
"""

import dataclasses
import json
from dataclasses import dataclass

from megatron_moellava.backbones import Backbone
from megatron_moellava.config import LoraConfig, RunConfig, to_dict
from megatron_moellava.stages import usual_roles

FREE = {
    "moe.moe_grouped_gemm": "",
    "moe.moe_token_dispatcher_type": "",
    "moe.moe_router_padding_for_quantization": "",
    "data.num_workers": "the order of samples does not know them",
    "data.max_skip_share": "a tolerance",
    "parallel.tensor_model_parallel_size": "",
    "parallel.pipeline_model_parallel_size": "",
    "parallel.virtual_pipeline_model_parallel_size": "",
    "parallel.num_layers_in_first_pipeline_stage": "",
    "parallel.pipeline_split": "",
    "parallel.context_parallel_size": "",
    "parallel.expert_model_parallel_size": "",
    "parallel.expert_tensor_parallel_size": "",
    "parallel.sequence_parallel": "",
    "parallel.distributed_timeout_minutes": "",
    "training.device": "",
    "training.transformer_impl": "the same model of other modules",
    "training.compile": "the same numbers but for their rounding",
    "training.non_finite_patience": "",
    "training.debug": "",
    "preference.log_probs": "their file says of which reference they are",
    "optimizer.overlap_grad_reduce": "",
    "optimizer.overlap_param_gather": "",
    "optimizer.gradient_accumulation_fusion": "",
    "checkpoint.save": "the folder may have been moved",
    "checkpoint.ckpt_step": "chooses the checkpoint",
    "checkpoint.save_interval": "",
    "checkpoint.keep": "",
    "checkpoint.async_save": "",
    "checkpoint.place_experts": "the same experts in other places",
    "logging.log_interval": "",
    "logging.routing_interval": "",
    "logging.straggler_interval": "",
    "logging.max_activations_interval": "",
    "logging.sample_ids": "",
    "logging.tensorboard": "",
    "logging.directory": "",
    "logging.trackers": "",
    "logging.project": "",
    "logging.run_name": "",
    "logging.offline": "",
    "validation.sources": "",
    "validation.interval": "",
    "validation.steps": "",
    "validation.best": "",
    "validation.ema": "",
    "profile.steps": "",
    "profile.ranks": "",
}
NOTED = {
    "moe.moe_router_dtype": "",
    "moe.moe_aux_loss_coeff": "",
    "moe.moe_z_loss_coeff": "",
    "moe.moe_router_load_balancing_type": "",
    "moe.balance_per_modality": "",
    "moe.moe_router_bias_update_rate": "",
    "moe.eval_capacity_factor": "evaluation alone",
    "moe.aux_loss_gradient": "",
    **{
        f"{section}.{name}": ""
        for section in ("tower_moe", "projector_moe")
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_load_balancing_type")
    },
    "data.ignore_keys": "rows that were bad may count now",
    "data.trust_paths": "rows that were bad may count now",
    "training.train_steps": "the schedule's length",
    "training.micro_batch_size": "the same samples per step; balancing losses are means over micro-batches",
    "training.precision": "the optimizer's fp32 weights stay",
    "training.fp8_recipe": "",
    "training.num_layers_at_start_in_bf16": "",
    "training.num_layers_at_end_in_bf16": "",
    "training.recompute": "rounding at most",
    "training.recompute_tower": "rounding at most",
    "training.distillation": "other logits are refused",
    "preference.beta": "",
    "preference.loss_coeff": "",
    "preference.quality_coeff": "",
    "preference.sft_coeff": "",
    "optimizer.lr": "",
    "optimizer.min_lr": "",
    "optimizer.projector_lr": "",
    "optimizer.roles": "",
    "optimizer.lr_decay_style": "",
    "optimizer.lr_wsd_decay_style": "",
    "optimizer.lr_wsd_decay_iters": "",
    "optimizer.lr_warmup_fraction": "",
    "optimizer.router_lr_warmup_fraction": "",
    "optimizer.weight_decay": "",
    "optimizer.adam_beta1": "",
    "optimizer.adam_beta2": "",
    "optimizer.adam_eps": "",
    "optimizer.clip_grad": "",
    "optimizer.muon_momentum": "",
    "optimizer.muon_nesterov": "",
    "optimizer.muon_scale_mode": "",
    "optimizer.muon_extra_scale_factor": "",
    "optimizer.muon_num_ns_steps": "",
    "optimizer.muon_fp32_matmul_prec": "",
    "optimizer.ema_decay": "a new average begins with the weights of then",
    "optimizer.main_params_dtype": "",
    "optimizer.stochastic_rounding": "",
    "optimizer.initial_loss_scale": "a scale that was saved goes on",
    "optimizer.min_loss_scale": "",
    "optimizer.loss_scale_window": "",
    "optimizer.hysteresis": "",
}
REFUSED = {
    "model.scale_multimodal_embeddings": "another function of the same weights",
    "moe.moe_router_topk": "another function of the same weights",
    "moe.router": "another function of the same weights",
    "moe.normalize_top1": "another function of the same weights",
    "moe.moe_router_pre_softmax": "another function of the same weights",
    "moe.moe_router_topk_scaling_factor": "another function of the same weights",
    "moe.moe_router_num_groups": "another function of the same weights",
    "moe.moe_router_group_topk": "another function of the same weights",
    "moe.expert_groups": "another function of the same weights",
    **{
        f"{section}.{name}": "another function of the same weights"
        for section in ("tower_moe", "projector_moe")
        for name in ("moe_router_topk", "normalize_top1")
    },
    "moe.moe_router_enable_expert_bias": "the biases have a history",
    "moe.moe_expert_capacity_factor": "other tokens reach the experts",
    "moe.min_capacity": "other tokens reach the experts",
    "moe.second_choice": "other tokens reach the experts",
    "data.template": "",
    "data.label_mode": "",
    "data.image_aspect_ratio": "",
    "data.image_grid": "",
    "data.max_image_tokens": "",
    "data.max_sample_image_tokens": "",
    "data.enlarge_images": "",
    "data.modalities": "the same files would show something else",
    "data.box_format": "",
    "data.video_frames": "",
    "data.video_fps": "",
    "data.video_times": "",
    "data.video_pooling": "",
    "data.seq_length": "",
    "data.max_sample_length": "",
    "data.length_counts": "",
    "data.long_samples": "",
    "data.packing": "",
    "data.packing_buffer": "decides which samples share a row",
    "data.sampler": "",
    "data.max_images": "decides which rows are bad",
    "training.stage": "",
    "training.global_batch_size": "steps count samples",
    "training.seed": "the data's order comes of it",
    "training.trains": "the optimizer holds the state of other parameters",
    "training.lora": "the optimizer holds the state of other parameters",
    "optimizer.optimizer": "their states are different ones",
    "preference.loss": "",
}
CONTENT = {
    "model.backbone": "validation.checkpoints compares every field of it",
    "model.tower": "validation.checkpoints compares every field of it",
    "moe.num_moe_experts": "validation.checkpoints compares the tensors that it makes",
    "moe.placement": "validation.checkpoints compares the layers that it names",
    "moe.moe_ffn_hidden_size": "validation.checkpoints compares the tensors that it makes",
    "moe.use_residual": "validation.checkpoints compares the tensors that it makes",
    "moe.moe_shared_expert_intermediate_size": "validation.checkpoints compares the tensors that it makes",
    "moe.moe_shared_expert_gate": "validation.checkpoints compares the tensors that it makes",
    "tower_moe.num_moe_experts": "validation.checkpoints compares the tensors that it makes",
    "tower_moe.placement": "validation.checkpoints compares the layers that it names",
    "projector_moe.num_moe_experts": "validation.checkpoints compares the tensors that it makes",
    "data.sources": "data.loader compares digests of the rows, and the weights",
    "data.tokenizer": "data.loader compares what it makes of a text",
    "checkpoint.load": "validation.checkpoints compares the seals of the start checkpoints",
    "preference.reference": "training.reference compares the seals of the references",
}


@dataclass(frozen=True, slots=True)
class Differences:
    """`field=value then, value now` of what a resume changes."""

    refused: list[str]
    noted: list[str]


def differences(saved: dict, run: RunConfig, backbone: Backbone) -> Differences:
    """Between the run that a checkpoint describes (`RunDescription.config`) and the run that would go on from it.

    Values are compared as they take effect: an unset field equals its default, spelled out. A field that the checkpoint's
    version did not have was at today's default then.
    """
    then, now = effective(saved, backbone), effective(to_dict(run), backbone)
    for section in ("moe", "tower_moe", "projector_moe"):
        if not saved.get(section):  # to a dense model that gets experts validation.checkpoints has its own answer
            now = {path: value for path, value in now.items() if not path.startswith(f"{section}.")}
    changed = {path: (then.get(path, default_of(path)), value) for path, value in now.items()}
    texts = {
        path: f"{path}={_shown(old)} then, {_shown(new)} now" for path, (old, new) in changed.items() if old != new
    }
    return Differences(*([text + _because(kind[path]) for path, text in texts.items() if path in kind]
                         for kind in (REFUSED, NOTED)))  # fmt: skip


def refusal(where: str, refused: list[str]) -> str:
    """What is said of fields that may not change."""
    return (
        f"{where} is of a run with other values: {'; '.join(refused)}. Give the values of then to go on with it, or start a "
        "new run from its weights: that folder as checkpoint.load, and another checkpoint.save"
    )


def effective(tree: dict, backbone: Backbone) -> dict[str, object]:
    """Values by dotted path, those that are unset replaced by what they stand for; of experts only where there are some."""
    plain = json.loads(json.dumps(tree))
    flat = {
        f"{section}.{name}": value
        for section, part in plain.items()
        if part is not None
        for name, value in part.items()
    }
    if flat.get("data.modalities"):  # their towers and projectors: validation.checkpoints compares every field of them
        flat["data.modalities"] = [
            {name: value for name, value in item.items() if name not in ("tower", "projector")}
            for item in flat["data.modalities"]
        ]
    stage, seq_length, lora = flat["training.stage"], flat["data.seq_length"], flat.get("training.lora")
    trains = flat.get("training.trains")
    flat["training.trains"] = sorted(trains if trains is not None else usual_roles(stage, lora and LoraConfig(**lora)))
    flat["data.template"] = flat.get("data.template") or backbone.template
    context = backbone.context_length or seq_length
    flat["data.max_sample_length"] = min(seq_length, flat.get("data.max_sample_length") or context)
    if not flat.get("data.packing", True):
        flat["data.packing_buffer"] = None
    if flat.get("optimizer.projector_lr") is None and "optimizer.lr" in flat:
        flat["optimizer.projector_lr"] = flat["optimizer.lr"]
    return flat


def fields_of_a_run() -> dict[str, dataclasses.Field]:
    """Every field of every section by its dotted path."""
    sections: dict = {item.name: item.type for item in dataclasses.fields(RunConfig)}
    classes = {name: kind if dataclasses.is_dataclass(kind) else kind.__args__[0] for name, kind in sections.items()}
    return {f"{name}.{item.name}": item for name, kind in classes.items() for item in dataclasses.fields(kind)}


def default_of(path: str) -> object:
    """Of a field that may be missing in the checkpoint of an older version."""
    item = fields_of_a_run().get(path)
    if item is None or item.default is dataclasses.MISSING:
        return None
    return list(item.default) if isinstance(item.default, tuple) else item.default  # as JSON has it


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_shown(part)}" for name, part in value.items() if part is not None)
    if isinstance(value, list):
        return ",".join(_shown(part) if isinstance(part, dict) else str(part) for part in value)
    return "none" if value is None else str(value)


def _because(why: str) -> str:
    return f" ({why})" if why else ""
