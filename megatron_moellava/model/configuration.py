"""Backbone, tower and run -> Megatron-Core's TransformerConfig, one for each of decoder, tower and projector."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import megatron_moellava.model.fused  # noqa: F401 -- the rotation that `apply_rope_fusion` asks for
import megatron_moellava.platform as platform
from megatron_moellava.backbones import Backbone
from megatron_moellava.config import MoEConfig, RunConfig
from megatron_moellava.costs.pipeline_split import stage_layers
from megatron_moellava.costs.shapes import expert_ffn_hidden_size
from megatron_moellava.placement import moe_layer_freq
from megatron_moellava.routers import ROUTERS
from megatron_moellava.towers import Tower

from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RECOMPUTE = {  # config value -> (granularity, modules)
    "none": (None, None),
    "full": ("full", None),
    "selective": ("selective", ["core_attn"]),
    "moe_act": ("selective", ["moe_act"]),
    "moe": ("selective", ["core_attn", "moe"]),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Recipe:
    """How Transformer Engine's recipe of the same name scales; `fp8.py` does it where there is no GPU."""

    format: str  # "e4m3" for all operands, or "hybrid": gradients in E5M2
    history: int = 0  # optimizer steps whose amaxes set the scale; 0: the operand's own
    block: int | None = None  # entries of a row that share a scale; None: the whole tensor
    square_weights: bool = False  # weights in blocks of block x block
    power_of_two: bool = False  # scales are powers of two (E8M0 in MXFP8)
    multiple: int = 16  # rows of each expert are padded to it


FP8_RECIPES = {
    "delayed": Fp8Recipe(format="hybrid", history=1024),
    "tensorwise": Fp8Recipe(format="hybrid"),
    "blockwise": Fp8Recipe(format="e4m3", block=128, square_weights=True, power_of_two=True),
    "mxfp8": Fp8Recipe(format="e4m3", block=32, power_of_two=True, multiple=32),
}


def transformer_config(backbone: Backbone, run: RunConfig) -> TransformerConfig:
    """Megatron-Core's configuration of the decoder."""
    granularity, recompute_modules = RECOMPUTE[run.training.recompute]
    latent = _latent_fields(backbone)
    return (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=backbone.num_layers,
        hidden_size=backbone.hidden_size,
        ffn_hidden_size=backbone.ffn_hidden_size,
        num_attention_heads=backbone.num_attention_heads,
        num_query_groups=backbone.num_query_groups,
        kv_channels=backbone.kv_channels,
        normalization=backbone.normalization,
        layernorm_epsilon=backbone.layernorm_epsilon,
        activation_func=ACTIVATIONS[backbone.activation],
        gated_linear_unit=backbone.gated_linear_unit,
        add_bias_linear=backbone.add_bias_linear,
        add_qkv_bias=backbone.add_qkv_bias,
        qk_layernorm=backbone.qk_layernorm,
        attention_dropout=backbone.attention_dropout,
        hidden_dropout=backbone.hidden_dropout,
        num_layers_in_first_pipeline_stage=run.parallel.num_layers_in_first_pipeline_stage,
        pipeline_model_parallel_layout=_pipeline_layout(stage_layers(run, backbone)),
        recompute_granularity=granularity,
        recompute_modules=recompute_modules,
        recompute_method="uniform" if granularity == "full" else None,
        recompute_num_layers=1 if granularity == "full" else None,
        bias_activation_fusion=(platform.HAS_CUDA or run.training.compile) and _fusable(backbone),
        apply_rope_fusion=not latent,
        **latent,
        **_shared_fields(run, **({} if run.moe else {"expert_model_parallel_size": 1})),
        **(
            _moe_fields(run.moe, backbone.num_layers, expert_ffn_hidden_size(run.moe, backbone))
            if run.moe
            else _DENSE_FIELDS
        ),
        **_fp8_fields(run),
    )


def _latent_fields(backbone: Backbone) -> dict:
    """Of multi-latent attention; none of another. `LatentSelfAttention` is handed the angles that the model makes, so that
    Megatron-Core's GPT is not told that its layers make their own, nor these how positions are scaled: the factor and the
    weight are those of the softmax."""
    latent, yarn = backbone.multi_latent_attention, backbone.yarn
    if latent is None:
        return {}
    return {
        "multi_latent_attention": False,
        "transformer_impl": "transformer_engine" if platform.HAS_TRANSFORMER_ENGINE else "local",
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_head_dim,
        "qk_pos_emb_head_dim": latent.qk_pos_emb_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "rope",
        "rotary_base": backbone.rotary_base,
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "mscale_all_dim": yarn.mscale_all_dim if yarn else 0.0,
    }


def _pipeline_layout(layers: list[int] | None) -> list[list[str]] | None:
    """Megatron-Core's way to say it: [1, 3] -> [[embedding, decoder], [decoder, decoder, decoder, loss]]."""
    if layers is None:
        return None
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _fusable(backbone: Backbone) -> bool:
    """Megatron-Core's fused bias + activation kernels: SwiGLU; its GELU kernel is an approximation of its own."""
    return backbone.activation == "silu" and backbone.gated_linear_unit


def _shared_fields(run: RunConfig, **overrides) -> dict:
    """Fields that the decoder, the tower and the projector have in common."""
    parallel, dtype = run.parallel, DTYPES[run.training.precision]
    tensor_parallel, fusion = parallel.tensor_model_parallel_size, run.optimizer.gradient_accumulation_fusion
    return {
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": tensor_parallel > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "batch_p2p_comm": platform.HAS_CUDA,  # on gloo a batch of both directions gives silently wrong numbers
        "variable_seq_lengths": not run.data.packing,
        "gradient_accumulation_fusion": platform.HAS_GRADIENT_FUSION if fusion is None else fusion,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        **overrides,
    }


# Megatron-Core refuses rows of different lengths with its default dispatcher, even in a model without experts.
_DENSE_FIELDS = {"moe_token_dispatcher_type": "alltoall"}


def _moe_fields(moe: MoEConfig, num_layers: int, moe_ffn_hidden_size: int) -> dict:
    balancing = moe.moe_router_load_balancing_type
    return {
        "num_moe_experts": moe.num_moe_experts,
        "moe_layer_freq": moe_layer_freq(moe.placement, num_layers),
        "moe_ffn_hidden_size": moe_ffn_hidden_size,
        "moe_router_topk": moe.moe_router_topk,
        "moe_router_dtype": "fp32" if moe.moe_router_dtype == "fp32" else None,  # None: the dtype of the hidden states
        # Megatron-Core demands it for one expert.
        "moe_router_pre_softmax": moe.moe_router_pre_softmax or moe.moe_router_topk == 1,
        "moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor,
        "moe_router_num_groups": moe.moe_router_num_groups,
        "moe_router_group_topk": moe.moe_router_group_topk,
        "moe_router_load_balancing_type": balancing,
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff if balancing != "none" and moe.aux_loss_gradient else 0.0,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_router_enable_expert_bias": moe.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": moe.moe_router_bias_update_rate,
        "moe_router_score_function": "sigmoid" if moe.moe_router_enable_expert_bias else "softmax",
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": moe.moe_shared_expert_gate,
        # The dispatcher counts tokens instead of assuming top-k of each whenever a capacity is set.
        "moe_expert_capacity_factor": 1.0
        if ROUTERS[moe.router].always_has_capacity
        else moe.moe_expert_capacity_factor,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_grouped_gemm": moe.moe_grouped_gemm,
        "moe_permute_fusion": platform.HAS_TRANSFORMER_ENGINE,
    }


def _fp8_fields(run: RunConfig) -> dict:
    """Which layers stay in high precision; on a GPU also Transformer Engine's recipe (on a CPU `fp8.py` has its own)."""
    training = run.training
    if training.fp8_recipe is None:
        return {}
    first, last = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    fields = {
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }
    if not platform.HAS_TRANSFORMER_ENGINE:
        return fields
    recipe = FP8_RECIPES[training.fp8_recipe]
    return fields | {
        "fp8": recipe.format,
        "fp8_recipe": training.fp8_recipe,
        "fp8_amax_history_len": recipe.history or 1,
        "fp8_amax_compute_algo": "max",
        "moe_router_padding_for_quantization": run.moe is not None and run.moe.moe_router_padding_for_quantization,
    }


def tower_config(tower: Tower, run: RunConfig) -> TransformerConfig:
    """Megatron-Core's configuration of the vision tower: whole on the first stage, tensor-parallel, never sequence-parallel."""
    return TransformerConfig(
        num_layers=tower.num_used_layers,
        hidden_size=tower.hidden_size,
        ffn_hidden_size=tower.ffn_hidden_size,
        num_attention_heads=tower.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=tower.layernorm_epsilon,
        activation_func=ACTIVATIONS[tower.activation],
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        recompute_granularity="full" if run.training.recompute_tower else None,
        recompute_method="uniform" if run.training.recompute_tower else None,
        recompute_num_layers=1 if run.training.recompute_tower else None,
        bias_activation_fusion=False,
        **_vision_fields(run, run.mixtures.get("tower"), tower.num_used_layers, tower.ffn_hidden_size),
    )


# The tower and the projector live whole on the first stage and see every token of their images.
_FIRST_STAGE_ONLY = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "variable_seq_lengths": False,
}


def _vision_fields(run: RunConfig, moe: MoEConfig | None, num_layers: int, moe_ffn_hidden_size: int) -> dict:
    """Of a part of the model on the first stage; its experts are divided like the language model's, but never cut."""
    if moe is None:
        return _shared_fields(run, **_FIRST_STAGE_ONLY)
    divided = {
        "expert_model_parallel_size": run.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }
    return _shared_fields(run, **(_FIRST_STAGE_ONLY | divided)) | _moe_fields(moe, num_layers, moe_ffn_hidden_size)


def projector_config(backbone: Backbone, run: RunConfig) -> TransformerConfig:
    """The two-layer projector: Linear, exact GELU, Linear, with biases, at the width of the language model."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=backbone.hidden_size,
        ffn_hidden_size=backbone.hidden_size,
        num_attention_heads=backbone.num_attention_heads,
        activation_func=F.gelu,
        add_bias_linear=True,
        bias_activation_fusion=False,
        **_shared_fields(run, **_FIRST_STAGE_ONLY),
    )


def moe_projector_config(backbone: Backbone, tower: Tower, run: RunConfig) -> TransformerConfig:
    """The projector as experts: a MoE layer at the width of the features, whose experts end at the language model's."""
    width = backbone.hidden_size
    return TransformerConfig(
        num_layers=1,
        hidden_size=tower.projector_input_size,
        ffn_hidden_size=width,
        num_attention_heads=backbone.num_attention_heads,
        activation_func=F.gelu,
        add_bias_linear=True,
        bias_activation_fusion=False,
        **_vision_fields(run, run.mixtures["projector"], 1, width),
    )
