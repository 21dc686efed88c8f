"""DeepSeek-V2-Lite: Llama with multi-latent attention (MLA), and the experts of DeepSeekMoE.

Keys and values come from a latent of 512 channels, queries from one of their own or, in the Lite model, from the hidden states.
The rotated channels of a head lie in neighbouring pairs. Positions are scaled by YaRN, whose mscale also scales the attention's
logits. `mla_*` is what DeepSeek-V3 shares.

DeepSeek-V2 (236B) chooses experts among the best groups, each judged by its best expert; Megatron-Core judges a group by the
sum of its best num_experts_per_tok // topk_group experts, so that `group_limited_greedy` is refused.
"""

from dataclasses import fields, replace

from megatron_moellava.backbones import deepseek_moe, llama
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, LatentAttention, Original, YarnScaling
from megatron_moellava.config import ConfigError
from megatron_moellava.hf_config import wrong_numbers
from megatron_moellava.mapping import copy

OURS, THEIRS = f"{llama.LAYER}self_attention.", f"{llama.HF_LAYER}self_attn."
MLA_MAPPING = llama.decoder_mapping(
    qkv=tuple(
        copy(f"{OURS}{ours}.weight", f"{THEIRS}{theirs}.weight")
        for ours, theirs in (
            ("linear_q_proj", "q_proj"),
            ("linear_q_down_proj", "q_a_proj"),
            ("q_layernorm", "q_a_layernorm"),
            ("linear_q_up_proj", "q_b_proj"),
            ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
            ("kv_layernorm", "kv_a_layernorm"),
            ("linear_kv_up_proj", "kv_b_proj"),
        )
    ),
    norms=llama.RMS_NORMS,
)
WIDTHS = {  # config key -> field of LatentAttention
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
# What transformers' config classes mean by a key that is not there; a published null of q_lora_rank is there.
WIDTHS_WHERE_ABSENT = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
MLA_FIELDS = {key: field for key, field in llama.FIELDS.items() if key not in ("rope_scaling", "head_dim")}
MLA_CONSTANTS = {"hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1, "moe_layer_freq": 1}
# Read by `mla_read`; sums of what is read; how the published code spreads experts over processes.
MLA_INERT = (*WIDTHS, "rope_scaling", "head_dim", "qk_head_dim", "ep_size")


def mla_read(settings: dict) -> dict:
    """The fields of the attention and of its positions. ConfigError for what is not built."""
    widths = {field: settings.get(key, WIDTHS_WHERE_ABSENT[key]) for key, field in WIDTHS.items()}
    wrong = wrong_numbers(LatentAttention, widths, WIDTHS)
    if (rank := widths["q_lora_rank"]) is not None and not (type(rank) is int and rank > 0):
        wrong.append(f"  q_lora_rank={rank!r}: must be a whole number above 0, or null")
    if wrong:
        raise ConfigError("config.json cannot be read:\n" + "\n".join(wrong))
    heads = settings["num_attention_heads"]
    if settings.get("num_key_value_heads") not in (None, heads):
        raise ConfigError(
            f"num_key_value_heads={settings['num_key_value_heads']} with num_attention_heads={heads}: multi-latent attention "
            "has keys and values for every head"
        )
    latent = LatentAttention(**widths)
    return {
        "multi_latent_attention": latent,
        "kv_channels": latent.qk_head_dim + latent.qk_pos_emb_head_dim,
        "yarn": _yarn(settings["rope_scaling"]) if settings.get("rope_scaling") else None,
    }


def _yarn(scaling: dict) -> YarnScaling:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "yarn":
        raise ConfigError(f"rope_scaling of type {kind!r}: only 'yarn' is supported with multi-latent attention")
    known = {item.name for item in fields(YarnScaling)}
    said = {key: value for key, value in scaling.items() if value is not None and key not in ("type", "rope_type")}
    if others := said.keys() - known - ({"truncate"} if said.get("truncate") is True else set()):
        raise ConfigError(
            f"rope_scaling has {', '.join(sorted(others))}: megatron-core's YaRN has only {', '.join(sorted(known))}"
        )
    if missing := {"factor", "original_max_position_embeddings"} - said.keys():
        raise ConfigError(f"rope_scaling lacks {', '.join(sorted(missing))}; add what the published model has")
    if bool(said.get("mscale")) != bool(said.get("mscale_all_dim")):
        raise ConfigError(
            f"rope_scaling.mscale={said.get('mscale')} with mscale_all_dim={said.get('mscale_all_dim')}: there must be both or "
            "neither, since published code and transformers read one alone differently"
        )
    values = {key: value for key, value in said.items() if key in known and value}
    if wrong := wrong_numbers(YarnScaling, values, {}):
        raise ConfigError("rope_scaling cannot be read:\n" + "\n".join(wrong))
    return YarnScaling(**values)


def mla_write(backbone: Backbone) -> dict:
    """The config keys of `mla_read`."""
    latent, yarn = backbone.multi_latent_attention, backbone.yarn
    assert latent is not None
    scaling = None
    if yarn:
        scaling = {"rope_type": "yarn"} | {item.name: getattr(yarn, item.name) for item in fields(YarnScaling)}
        if not yarn.mscale_all_dim:
            del scaling["mscale"], scaling["mscale_all_dim"]
    return {key: getattr(latent, field) for key, field in WIDTHS.items()} | {"rope_scaling": scaling}


def read(settings: dict) -> dict:
    """`mla_read`, of a model whose router does not choose among groups."""
    method = settings.get("topk_method") or "greedy"
    if method != "greedy":
        raise ConfigError(
            f"topk_method={method!r}: DeepSeek-V2 judges a group of experts by its best one, and megatron-core 0.19.2 by the "
            "sum of its best num_experts_per_tok // topk_group; only 'greedy' (DeepSeek-V2-Lite) is supported"
        )
    return mla_read(settings)


HF = HuggingFace(
    family="deepseek_v2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    original=Original(name="deepseek_v2", stem="DeepseekV2"),
    fields=MLA_FIELDS,
    defaults=llama.DEFAULTS,
    # transformers leaves the weights of the chosen experts as they are, whatever norm_topk_prob says.
    constants=MLA_CONSTANTS | {"mlp_bias": False, "scoring_func": "softmax", "seq_aux": True, "norm_topk_prob": False},
    # The groups of a greedy choice; the method itself: see `read`. The last: whether transformers adds the balancing loss.
    inert=(*MLA_INERT, "n_group", "topk_group", "topk_method", "output_router_logits"),
    read=read,
    write=lambda backbone: mla_write(backbone) | {"topk_method": "greedy"},
    experts=replace(
        deepseek_moe.EXPERTS,
        fields={**deepseek_moe.EXPERTS.fields, "routed_scaling_factor": "moe_router_topk_scaling_factor"},
        defaults={**deepseek_moe.EXPERTS.defaults, "routed_scaling_factor": 1.0},
    ),
)

DEEPSEEK_V2_LITE_MLA = LatentAttention(
    q_lora_rank=None, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128
)
DEEPSEEK_V2_LITE = replace(
    deepseek_moe.DEEPSEEK_MOE_16B,
    name="deepseek-v2-lite",
    source="https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/blob/main/config.json",
    num_layers=27,
    kv_channels=192,
    max_position_embeddings=163840,
    multi_latent_attention=DEEPSEEK_V2_LITE_MLA,
    yarn=YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    moe=replace(deepseek_moe.DEEPSEEK_MOE_16B_EXPERTS, placement=tuple(range(1, 27))),
    hf=HF,
    mapping=MLA_MAPPING,
)
DEEPSEEK_V2_TINY = replace(
    deepseek_moe.DEEPSEEK_MOE_TINY,
    name="deepseek-v2-tiny",
    num_query_groups=4,
    kv_channels=32,
    multi_latent_attention=LatentAttention(
        q_lora_rank=None, kv_lora_rank=48, qk_head_dim=24, qk_pos_emb_head_dim=8, v_head_dim=20
    ),
    yarn=YarnScaling(factor=4.0, original_max_position_embeddings=512, mscale=0.707, mscale_all_dim=0.707),
    hf=HF,
    mapping=MLA_MAPPING,
)
SIZES = (DEEPSEEK_V2_LITE, DEEPSEEK_V2_TINY)
