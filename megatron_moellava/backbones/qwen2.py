"""Qwen1.5, Qwen2 and Qwen2.5: one architecture. Unlike Llama: biases on q, k and v, rotary base 1e6.

MoE-LLaVA calls it qwen1_5. Small sizes tie the output layer to the embeddings. `sliding_window` in the published
configs is switched off by `use_sliding_window`.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original
from megatron_moellava.mapping import QKV, both

MAPPING = llama.decoder_mapping(qkv=both(QKV, *llama.SPLIT_QKV), norms=llama.RMS_NORMS)

HF = HuggingFace(
    family="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    original=Original(name="qwen1_5", stem="Qwen1_5"),
    fields=llama.FIELDS,
    defaults=llama.DEFAULTS,
    constants={"hidden_act": "silu", "use_sliding_window": False},
    inert=("sliding_window", "max_window_layers", "use_mrope"),
    moe_model_type="qwen2_moe",
)

QWEN1_5_1_8B = Backbone(
    name="qwen1.5-1.8b",
    source="https://huggingface.co/Qwen/Qwen1.5-1.8B/blob/main/config.json",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5504,
    num_attention_heads=16,
    num_query_groups=16,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=32768,
    layernorm_epsilon=1e-6,
    add_qkv_bias=True,
    rotary_base=1e6,
    template="qwen",
    hf=HF,
    mapping=MAPPING,
)
QWEN1_5_0_5B = replace(
    QWEN1_5_1_8B,
    name="qwen1.5-0.5b",
    source="https://huggingface.co/Qwen/Qwen1.5-0.5B/blob/main/config.json",
    hidden_size=1024,
    ffn_hidden_size=2816,
    kv_channels=64,
    share_embeddings_and_output_weights=True,
)
QWEN1_5_7B = replace(
    QWEN1_5_1_8B,
    name="qwen1.5-7b",
    source="https://huggingface.co/Qwen/Qwen1.5-7B/blob/main/config.json",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
)
QWEN2_0_5B = replace(
    QWEN1_5_0_5B,
    name="qwen2-0.5b",
    source="https://huggingface.co/Qwen/Qwen2-0.5B/blob/main/config.json",
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    max_position_embeddings=131072,
    template="chatml",
)
QWEN2_1_5B = replace(
    QWEN2_0_5B,
    name="qwen2-1.5b",
    source="https://huggingface.co/Qwen/Qwen2-1.5B/blob/main/config.json",
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    kv_channels=128,
)
QWEN2_7B = replace(
    QWEN2_1_5B,
    name="qwen2-7b",
    source="https://huggingface.co/Qwen/Qwen2-7B/blob/main/config.json",
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    vocab_size=152064,
    share_embeddings_and_output_weights=False,
)
QWEN2_5_0_5B = replace(
    QWEN2_0_5B,
    name="qwen2.5-0.5b",
    source="https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json",
    max_position_embeddings=32768,
)
QWEN2_5_1_5B = replace(
    QWEN2_1_5B, name="qwen2.5-1.5b", source="https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json"
)
QWEN2_5_3B = replace(
    QWEN2_1_5B,
    name="qwen2.5-3b",
    source="https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/config.json",
    num_layers=36,
    hidden_size=2048,
    ffn_hidden_size=11008,
    num_attention_heads=16,
    max_position_embeddings=32768,
)
QWEN2_5_7B = replace(QWEN2_7B, name="qwen2.5-7b", source="https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json")
QWEN2_TINY = replace(
    QWEN1_5_1_8B,
    name="qwen2-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=2048,
)
SIZES = (
    QWEN1_5_1_8B,
    QWEN1_5_0_5B,
    QWEN1_5_7B,
    QWEN2_0_5B,
    QWEN2_1_5B,
    QWEN2_7B,
    QWEN2_5_0_5B,
    QWEN2_5_1_5B,
    QWEN2_5_3B,
    QWEN2_5_7B,
    QWEN2_TINY,
)
