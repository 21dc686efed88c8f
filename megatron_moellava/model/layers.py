"""Backbone and run -> Megatron-Core's layer specs. With configuration.py the only reader of a backbone's quirks.

A block is a list of layer specs, one per decoder layer of this pipeline stage, dense or MoE by the run's placement.
Local modules without Transformer Engine, its fused modules with it; parameter names in checkpoints are the same.
"""

from functools import partial

import megatron_moellava.platform as platform
from megatron_moellava.backbones import Backbone
from megatron_moellava.config import MoEConfig
from megatron_moellava.model.attention import SdpaCoreAttention
from megatron_moellava.model.experts import GroupedColumnLinear, GroupedMLP, GroupedRowLinear
from megatron_moellava.model.kv_cache import CachedSelfAttention
from megatron_moellava.model.latent_attention import LatentSelfAttention
from megatron_moellava.model.moe_layer import MoELayer, ResidualMoELayer, VisionMoELayer
from megatron_moellava.model.norms import HeadsNorm, Norm
from megatron_moellava.model.router_kinds import router_builder
from megatron_moellava.model.temporal import TemporalLayer
from megatron_moellava.routers import ROUTERS

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)


class SequentialRowLinear(RowParallelLinear):
    """fc2 of one expert; the token dispatcher reduces its partial sums.

    Megatron-Core knows that only with several ranks. With one it reduces over a group of one, which returns a view,
    and then adds the bias to it in place, which autograd forbids.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.explicit_expert_comm = True


class LocalModules(LocalSpecProvider):
    """Megatron-Core's own linear layers, torch's norms, SDPA and grouped GEMM: any machine."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False):
        return Norm

    def core_attention(self):
        return SdpaCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool):
        if moe_use_grouped_gemm:
            return partial(GroupedMLP, submodules=GroupedMLPSubmodules(GroupedColumnLinear, GroupedRowLinear))
        return partial(SequentialMLP, submodules=MLPSubmodules(ColumnParallelLinear, SequentialRowLinear))


class OwnAttentionModules(TESpecProvider):
    """Transformer Engine's modules around our own attention, where its kernels would do something else.

    Context parallelism: ours cuts packed rows anywhere, without padding. Rows whose padding counts: they need a mask that is
    causal and hides padding, and Transformer Engine's fused and flash kernels take the causal type and ignore the mask.
    """

    def core_attention(self):
        return SdpaCoreAttention


class AdaptedModules(TESpecProvider):
    """Norms of their own before Transformer Engine's linear layers: adapters need the input that these multiply."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False


class AdaptedOwnAttentionModules(AdaptedModules, OwnAttentionModules):
    """Both."""


ENGINE_MODULES = {  # (own attention, adapted) -> provider
    (False, False): TESpecProvider,
    (True, False): OwnAttentionModules,
    (False, True): AdaptedModules,
    (True, True): AdaptedOwnAttentionModules,
}


def modules(own_attention: bool = False, adapted: bool = False):
    """The module provider of this machine. `adapted`: adapters (lora.py) will listen to the linear layers."""
    return ENGINE_MODULES[own_attention, adapted]() if platform.HAS_TRANSFORMER_ENGINE else LocalModules()


def needs_own_attention(config: TransformerConfig, moe: MoEConfig | None) -> bool:
    """Whether the decoder's rows are such that Transformer Engine's attention would give another result."""
    return config.context_parallel_size > 1 or (moe is not None and ROUTERS[moe.router].counts_padding)


def decoder_spec(
    backbone: Backbone,
    config: TransformerConfig,
    moe: MoEConfig | None,
    vp_stage: int | None = None,
    adapted: bool = False,
) -> TransformerBlockSubmodules:
    """Layer specs of this pipeline stage (or of one of its virtual stages).

    `adapted`: see `modules`.
    """
    provider = modules(needs_own_attention(config, moe), adapted)
    dense = _layer_spec(backbone, provider, _dense_mlp(provider, backbone))
    sparse = _layer_spec(backbone, provider, _moe_mlp(provider, moe), is_moe=True) if moe else dense
    freq = config.moe_layer_freq if moe else [0] * backbone.num_layers
    offset = get_transformer_layer_offset(config, vp_stage)
    built = freq[offset : offset + get_num_layers_to_build(config, vp_stage)]
    norm = provider.layer_norm(rms_norm=backbone.normalization == "RMSNorm")
    return TransformerBlockSubmodules(layer_specs=[sparse if is_moe else dense for is_moe in built], layer_norm=norm)


def tower_spec(
    config: TransformerConfig, adapted: bool = False, moe: MoEConfig | None = None, num_frames: int = 1
) -> TransformerBlockSubmodules:
    """Pre-norm blocks with full attention, as CLIP and SigLIP have them. `adapted`: see `modules`.

    `num_frames`: of a video, where layers attend across them.
    """
    provider = modules(adapted=adapted)
    dense = _attention_layer(provider, AttnMaskType.no_mask, get_mlp_module_spec_for_backend(provider), fused=True)
    dense = _across_frames(dense, provider, num_frames)
    if moe is None:
        return TransformerBlockSubmodules(layer_specs=[dense] * config.num_layers, layer_norm=None)
    mlp = partial(VisionMoELayer, submodules=vision_moe_submodules(moe, provider))
    sparse = _attention_layer(provider, AttnMaskType.no_mask, mlp, fused=True, is_moe=True)
    sparse = _across_frames(sparse, provider, num_frames)
    specs = [sparse if is_moe else dense for is_moe in config.moe_layer_freq]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=None)


def _across_frames(layer: ModuleSpec, provider, num_frames: int) -> ModuleSpec:
    """The layer as one that first attends across the frames of a video, if there are several."""
    if num_frames == 1:
        return layer
    other = _attention_layer(provider, AttnMaskType.no_mask, IdentityOp, fused=False)
    params = {
        "num_frames": num_frames,
        "temporal_norm": provider.layer_norm(),
        "temporal_attention": other.submodules.self_attention,
    }
    return ModuleSpec(TemporalLayer, params=params, submodules=layer.submodules)


def vision_moe_submodules(moe: MoEConfig, provider=None) -> MoESubmodules:
    """Router and experts of a MoE layer of the tower or the projector."""
    provider = provider or modules()
    return MoESubmodules(
        router=router_builder(moe), experts=provider.grouped_mlp_modules(moe.moe_grouped_gemm), shared_experts=None
    )


def mlp_submodules(provider=None, fused_norm: bool = False) -> MLPSubmodules:
    """fc1 (optionally with the norm before it fused in) and fc2 of a dense FFN."""
    provider = provider or modules()
    column = provider.column_parallel_layer_norm_linear() if fused_norm else provider.column_parallel_linear()
    return MLPSubmodules(linear_fc1=column, linear_fc2=provider.row_parallel_linear())


def _dense_mlp(provider, backbone: Backbone):
    fused = provider.fuse_layernorm_and_linear() and not backbone.parallel_residual
    return partial(MLP.as_mlp_submodule, submodules=mlp_submodules(provider, fused))


def _moe_mlp(provider, moe: MoEConfig):
    dense = mlp_submodules(provider)
    submodules = MoESubmodules(
        router=router_builder(moe),
        experts=provider.grouped_mlp_modules(moe.moe_grouped_gemm),
        shared_experts=partial(_shared_experts, submodules=dense),
    )
    if moe.use_residual:
        return partial(ResidualMoELayer, submodules=submodules, dense=dense)
    return partial(MoELayer, submodules=submodules)


def _shared_experts(*, config, pg_collection, gate, submodules, name=None):
    return SharedExpertMLP(config=config, submodules=submodules, gate=gate, pg_collection=pg_collection, name=name)


def _layer_spec(backbone: Backbone, provider, mlp, is_moe: bool = False) -> ModuleSpec:
    add = get_bias_dropout_add
    if backbone.residual_multiplier != 1.0:
        add = _scaled_add(backbone.residual_multiplier)
    fused = provider.fuse_layernorm_and_linear() and not backbone.parallel_residual
    spec = _attention_layer(provider, AttnMaskType.causal, mlp, fused, is_moe, backbone, add)
    if backbone.parallel_residual:
        spec.module = ParallelResidualLayer
        spec.submodules.pre_mlp_layernorm = IdentityOp
    return spec


def _attention_layer(
    provider, mask_type, mlp, fused, is_moe=False, backbone=None, add=get_bias_dropout_add
) -> ModuleSpec:
    """One transformer layer. `fused`: norms live inside the linear layers that follow them, if the provider can."""
    fused = fused and provider.fuse_layernorm_and_linear()
    rms = backbone is not None and backbone.normalization == "RMSNorm"
    norm = provider.layer_norm(rms_norm=rms)
    q_norm, k_norm = _qk_norms(provider, backbone) if backbone and backbone.qk_layernorm else (IdentityOp, IdentityOp)
    qkv = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    attention = ModuleSpec(
        CachedSelfAttention,
        params={"attn_mask_type": mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )
    latent = backbone is not None and backbone.multi_latent_attention is not None
    submodules = TransformerLayerSubmodules(
        input_layernorm=IdentityOp if fused and not latent else norm,  # two layers read what it norms
        self_attention=_latent_attention(provider, mask_type, backbone) if latent else attention,
        self_attn_bda=add,
        pre_mlp_layernorm=IdentityOp if fused and not is_moe else norm,
        mlp=mlp,
        mlp_bda=add,
        sharded_state_dict_keys_map={
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
        if fused
        else {},
    )
    return ModuleSpec(TransformerLayer, submodules=submodules)


def _latent_attention(provider, mask_type, backbone: Backbone) -> ModuleSpec:
    """Multi-latent attention; see `LatentSelfAttention` for the norms."""
    latent, yarn = backbone.multi_latent_attention, backbone.yarn
    assert latent is not None
    column = provider.column_parallel_linear()
    return ModuleSpec(
        LatentSelfAttention,
        params={
            "attn_mask_type": mask_type,
            "attention_factor": yarn.attention_factor if yarn else 1.0,
            "norm": partial(provider.layer_norm(rms_norm=True, for_qk=True), eps=latent.layernorm_epsilon),
        },
        submodules=MLASelfAttentionSubmodules(
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=provider.core_attention(),
        ),
    )


def _qk_norms(provider, backbone: Backbone) -> tuple:
    if backbone.qk_layernorm_spans_heads:
        return tuple(partial(HeadsNorm, heads) for heads in (backbone.num_attention_heads, backbone.num_query_groups))
    return (provider.layer_norm(rms_norm=backbone.normalization == "RMSNorm", for_qk=True),) * 2


def _scaled_add(multiplier: float):
    """bias-dropout-add whose branch is scaled before it joins the residual stream (MiniCPM).

    A plain function: Megatron-Core takes any other callable for a class to build.
    """

    def get_scaled_add(training: bool, fused: bool):
        add = get_bias_dropout_add(training, fused)

        def scaled(branch_with_bias, residual, dropout):
            branch, bias = branch_with_bias
            return add((branch * multiplier, None if bias is None else bias * multiplier), residual, dropout)

        return scaled

    return get_scaled_add


class ParallelResidualLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm(x)), one norm for both (Phi)."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        context=None,
        context_mask=None,
        padding_mask=None,
        inference_context=None,
        rotary_pos_cos_sin=None,
        **attention_arguments,
    ):
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(
            normed,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_cos_sin=rotary_pos_cos_sin,
            **attention_arguments,
        )
        fed = self.mlp(normed, padding_mask=padding_mask)
        add_attention = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        add_mlp = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        hidden_states = add_attention(attended, hidden_states, self.hidden_dropout)
        return add_mlp(fed, hidden_states, self.hidden_dropout), context
