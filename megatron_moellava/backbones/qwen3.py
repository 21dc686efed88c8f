"""Qwen3, dense. Unlike Llama: RMSNorm over each head of q and k, heads wider than hidden / heads, rotary base 1e6."""

from dataclasses import replace

from megatron_moellava.backbones import llama
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original
from megatron_moellava.mapping import QKV, weight

MAPPING = llama.decoder_mapping(qkv=(*weight(QKV, *llama.SPLIT_QKV), *llama.QK_NORMS), norms=llama.RMS_NORMS)

HF = HuggingFace(
    family="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    # MoE-LLaVA predates Qwen3; these are names in its manner.
    original=Original(name="qwen3", stem="Qwen3"),
    fields={key: field for key, field in llama.FIELDS.items() if key != "rope_scaling"},
    defaults=llama.DEFAULTS | {"head_dim": 128},
    constants={"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "use_sliding_window": False},
    inert=("sliding_window", "max_window_layers"),
    moe_model_type="qwen3_moe",
)

QWEN3_0_6B = Backbone(
    name="qwen3-0.6b",
    source="https://huggingface.co/Qwen/Qwen3-0.6B/blob/main/config.json",
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
    layernorm_epsilon=1e-6,
    qk_layernorm=True,
    rotary_base=1e6,
    share_embeddings_and_output_weights=True,
    template="chatml",
    hf=HF,
    mapping=MAPPING,
)
QWEN3_1_7B = replace(
    QWEN3_0_6B,
    name="qwen3-1.7b",
    source="https://huggingface.co/Qwen/Qwen3-1.7B/blob/main/config.json",
    hidden_size=2048,
    ffn_hidden_size=6144,
)
QWEN3_4B = replace(
    QWEN3_0_6B,
    name="qwen3-4b",
    source="https://huggingface.co/Qwen/Qwen3-4B/blob/main/config.json",
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
)
QWEN3_8B = replace(
    QWEN3_4B,
    name="qwen3-8b",
    source="https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json",
    hidden_size=4096,
    ffn_hidden_size=12288,
    share_embeddings_and_output_weights=False,
)
QWEN3_TINY = replace(
    QWEN3_0_6B,
    name="qwen3-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=48,
    vocab_size=512,
    max_position_embeddings=2048,
)
SIZES = (QWEN3_0_6B, QWEN3_1_7B, QWEN3_4B, QWEN3_8B, QWEN3_TINY)
