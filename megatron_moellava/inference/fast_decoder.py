"""The decoder spelt out for a rank that holds all of it.

With one token per request, a layer of Megatron-Core's modules spends most of its time on the way to the products:
process groups, autograd functions, the token dispatcher. Here the same parameters go through plain torch operations; the
experts of all tokens are two products, and weights are laid out for few rows (`products.py`). What is not spelt out
(multi-latent attention, shared experts, unusual routers) runs through its module. tests/unit/inference/test_engine.py compares
every logit with the modules' own.

Shapes: T tokens of a step, H hidden, E experts, K choices of a token, G query groups, D channels of a head.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from megatron_moellava import platform
from megatron_moellava.inference.packed_linear import PackedLinear, can_pack
from megatron_moellava.model.experts import GroupedLinear
from megatron_moellava.model.kv_cache import KVCache
from megatron_moellava.model.latent_attention import LatentSelfAttention
from megatron_moellava.model.moe_layer import MoELayer, ResidualMoELayer
from megatron_moellava.model.moe_llava import MoELlava
from megatron_moellava.model.router import MegatronRouter
from megatron_moellava.routing.observer import is_observed

from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP

FEW_TOKENS = 16  # up to which the weights of all experts cost more to read than the products to compute


def can_decode_fast() -> bool:
    """Whether this rank holds every parameter, in modules whose names are known here."""
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    return max(sizes) == 1 and not platform.HAS_TRANSFORMER_ENGINE


@dataclass(slots=True)
class FastDecoder:
    """One step through all layers, from embeddings to logits, without Megatron-Core's modules."""

    model: MoELlava
    product: PackedLinear = field(init=False)
    angles_S11C: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.product = PackedLinear(can_pack(self.model.config.params_dtype))

    def __call__(self, hidden_T1H: torch.Tensor, cache: KVCache, marks_1T2: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [L, V] of the tokens that the step asks for. `marks`: what the routers are told of them (`router_mask`)."""
        language, backbone = self.model.language_model, self.model.backbone
        if self.angles_S11C is None:
            self.angles_S11C = language.rotary_pos_emb(cache.max_sequence_length)
        hidden_TH = hidden_T1H.squeeze(1)
        for layer in language.decoder.layers:
            normed_TH = layer.input_layernorm(hidden_TH)
            attended_TH = self._attention(layer, normed_TH, cache, self.angles_S11C) * backbone.residual_multiplier
            if backbone.parallel_residual:
                hidden_TH = hidden_TH + attended_TH + feed_forward(self.product, layer.mlp, normed_TH, marks_1T2)
                continue
            hidden_TH = hidden_TH + attended_TH
            fed_TH = feed_forward(self.product, layer.mlp, layer.pre_mlp_layernorm(hidden_TH), marks_1T2)
            hidden_TH = hidden_TH + fed_TH * backbone.residual_multiplier
        hidden_LH = (
            language.decoder.final_layernorm(hidden_TH[cache.current_step.last_tokens()]) / backbone.logits_divisor
        )
        tied = language.share_embeddings_and_output_weights
        weight_VH = language.shared_embedding_or_output_weight() if tied else language.output_layer.weight
        return self.product(hidden_LH, weight_VH, language.output_layer.bias)[:, : backbone.vocab_size]

    def _attention(self, layer, normed_TH: torch.Tensor, cache: KVCache, angles_S11C: torch.Tensor) -> torch.Tensor:
        attention, backbone = layer.self_attention, self.model.backbone
        if isinstance(attention, LatentSelfAttention):
            attended_T1H, _ = attention(normed_TH.unsqueeze(1), None, cache, angles_S11C)
            return attended_T1H.squeeze(1)
        qkv_TN = self.product(normed_TH, attention.linear_qkv.weight, attention.linear_qkv.bias)
        qkv_TGXD = qkv_TN.view(len(qkv_TN), backbone.num_query_groups, -1, backbone.kv_channels)
        value_TGD = qkv_TGXD[:, :, -1]
        if attention.q_layernorm is not None:
            query_THD = attention.q_layernorm(qkv_TGXD[:, :, :-2].flatten(1, 2))
            key_TGD = attention.k_layernorm(qkv_TGXD[:, :, -2])
            context_TH = cache.attend(attention.layer_number, query_THD, key_TGD, value_TGD, angles_S11C)
        else:  # queries and keys turn together
            turned_TGXD = cache.rotate(qkv_TGXD[:, :, :-1], angles_S11C)
            query_THD, key_TGD = turned_TGXD[:, :, :-1].flatten(1, 2), turned_TGXD[:, :, -1]
            context_TH = cache.look(attention.layer_number, query_THD, key_TGD, value_TGD)
        return self.product(context_TH, attention.linear_proj.weight, attention.linear_proj.bias)


def feed_forward(product: PackedLinear, mlp, x_TH: torch.Tensor, marks_1T2: torch.Tensor | None = None) -> torch.Tensor:
    """The output of a layer's MLP or experts."""
    if isinstance(mlp, MLP):
        return dense(product, mlp, x_TH)
    if isinstance(mlp, ResidualMoELayer) and is_plain(mlp):
        share_T2 = mlp.coefficient(x_TH).softmax(dim=-1)
        return (
            experts(product, mlp, x_TH, marks_1T2) * share_T2[:, :1]
            + dense(product, mlp.residual_mlp, x_TH) * share_T2[:, 1:]
        )
    if type(mlp) is MoELayer and is_plain(mlp):
        return experts(product, mlp, x_TH, marks_1T2)
    output_T1H, bias_H = mlp(x_TH.unsqueeze(1), padding_mask=marks_1T2)
    return output_T1H.squeeze(1) if bias_H is None else output_T1H.squeeze(1) + bias_H


def is_plain(mlp: MoELayer) -> bool:
    """Grouped experts without shared ones beside them."""
    return mlp.shared_experts is None and isinstance(getattr(mlp.experts, "linear_fc1", None), GroupedLinear)


def dense(product: PackedLinear, mlp: MLP, x_TH: torch.Tensor) -> torch.Tensor:
    """A dense MLP, [T, H] -> [T, H]."""
    inner_TF = activate(mlp.config, product(x_TH, mlp.linear_fc1.weight, mlp.linear_fc1.bias))
    return product(inner_TF, mlp.linear_fc2.weight, mlp.linear_fc2.bias)


def activate(config, inner_TF: torch.Tensor) -> torch.Tensor:
    """The activation of [T, F] inner channels; gated: [gate, up] of twice the width -> activation(gate) * up."""
    if not config.gated_linear_unit:
        return config.activation_func(inner_TF)
    gate_TF, up_TF = inner_TF.chunk(2, dim=-1)
    return config.activation_func(gate_TF) * up_TF


def experts(
    product: PackedLinear, mlp: MoELayer, x_TH: torch.Tensor, marks_1T2: torch.Tensor | None = None
) -> torch.Tensor:
    """Tokens sorted by expert -> two grouped products -> back, weighted by the router."""
    weights_TK, experts_TK = choices(mlp.router, x_TH, marks_1T2)
    fc1, fc2 = mlp.experts.linear_fc1, mlp.experts.linear_fc2
    if len(x_TH) <= FEW_TOKENS and fc1.num_experts <= experts_TK.numel():
        return every_expert(product, mlp, x_TH, weights_TK, experts_TK)
    order_N = experts_TK.flatten().argsort(stable=True)  # N = T * K
    tokens_N, sorted_N = order_N // experts_TK.shape[1], experts_TK.flatten()[order_N]
    numbers_E = torch.arange(fc1.num_experts, device=sorted_N.device)
    offsets_E = torch.searchsorted(sorted_N, numbers_E, right=True).to(torch.int32)
    inner_NF = F.grouped_mm(x_TH[tokens_N], fc1.fused["weight"].transpose(1, 2), offs=offsets_E)
    if fc1.use_bias:
        inner_NF = inner_NF + fc1.fused["bias"][sorted_N]
    output_NH = F.grouped_mm(activate(mlp.config, inner_NF), fc2.fused["weight"].transpose(1, 2), offs=offsets_E)
    if fc2.use_bias:
        output_NH = output_NH + fc2.fused["bias"][sorted_N]
    weights_N1 = weights_TK.flatten()[order_N].unsqueeze(1).to(x_TH.dtype)
    return torch.zeros_like(x_TH).index_add(0, tokens_N, output_NH * weights_N1)


def every_expert(product: PackedLinear, mlp: MoELayer, x_TH, weights_TK, experts_TK) -> torch.Tensor:
    """The same for few tokens, whose choices reach nearly all experts: reading the weights is the work, so every expert
    computes every token and nothing is sorted."""
    fc1, fc2 = mlp.experts.linear_fc1, mlp.experts.linear_fc2
    weights_TE = weights_TK.new_zeros(len(x_TH), fc1.num_experts).scatter(1, experts_TK, weights_TK).to(x_TH.dtype)
    inner_TX = product(x_TH, fc1.fused["matrix"], fc1.fused["bias"].flatten() if fc1.use_bias else None)
    inner_TEF = activate(mlp.config, inner_TX.unflatten(1, (fc1.num_experts, -1))) * weights_TE.unsqueeze(2)
    output_TH = product(inner_TEF.flatten(1), fc2.fused["matrix"])
    return output_TH + weights_TE @ fc2.fused["bias"] if fc2.use_bias else output_TH


def choices(
    router: MegatronRouter, x_TH: torch.Tensor, marks_1T2: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) [T, K]. The default router in four operations; any other, and a watched one, by its module."""
    config = router.config
    simple = type(router) is MegatronRouter and config.moe_router_score_function == "softmax"
    simple = simple and config.moe_router_dtype == "fp32" and not config.moe_router_topk_scaling_factor
    # The softmax comes before the choice also where there is but one.
    if not simple or config.moe_router_pre_softmax or is_observed(router):
        probs_TE, _ = router(x_TH.unsqueeze(1), None if marks_1T2 is None else marks_1T2.transpose(0, 1))
        return probs_TE.topk(config.moe_router_topk, dim=-1)
    logits_TK, experts_TK = F.linear(x_TH.float(), router.weight).topk(config.moe_router_topk, dim=-1)
    return logits_TK.softmax(dim=-1), experts_TK
