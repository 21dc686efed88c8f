"""Llama, the family that every other file is described against: RMSNorm, SwiGLU, full rotary, no biases.

Vicuna v1.5 (the language model of LLaVA-1.5) is Llama-2 fine-tuned. Llama-3 adds grouped queries and more vocabulary,
Llama-3.1 and later scale the rotary frequencies, and Llama-3.2 ties the output layer to the embeddings.
"""

from dataclasses import replace

from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original, RopeScaling
from megatron_moellava.mapping import QKV, Concat, Mapping, copy, weight

LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."


def decoder_mapping(
    *,
    qkv: tuple[Mapping, ...],
    norms: tuple[Mapping, ...],
    ffn: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Mapping, ...]:
    """The table of a Llama-like decoder; the families differ in the biases of qkv, in their norms, and in what they call
    the matrices of the FFN."""
    gate, up, down = (f"{HF_LAYER}mlp.{name}" for name in ffn)
    return (
        copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *qkv,
        copy(f"{LAYER}self_attention.linear_proj.weight", f"{HF_LAYER}self_attn.o_proj.weight"),
        *norms,
        *weight(Concat, f"{LAYER}mlp.linear_fc1", gate, up),
        copy(f"{LAYER}mlp.linear_fc2.weight", f"{down}.weight"),
        copy("output_layer.weight", "lm_head.weight"),
    )


SPLIT_QKV = (f"{LAYER}self_attention.linear_qkv", *(f"{HF_LAYER}self_attn.{name}_proj" for name in "qkv"))
QK_NORMS = tuple(
    copy(f"{LAYER}self_attention.{name}_layernorm.weight", f"{HF_LAYER}self_attn.{name}_norm.weight") for name in "qk"
)
RMS_NORMS = (
    copy(f"{LAYER}input_layernorm.weight", f"{HF_LAYER}input_layernorm.weight"),
    copy(f"{LAYER}pre_mlp_layernorm.weight", f"{HF_LAYER}post_attention_layernorm.weight"),
    copy("decoder.final_layernorm.weight", "model.norm.weight"),
)
MAPPING = decoder_mapping(qkv=weight(QKV, *SPLIT_QKV), norms=RMS_NORMS)

# Config keys that all Llama-like families share.
FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "rope_scaling": "rope_scaling",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "attention_dropout": "attention_dropout",
}
DEFAULTS = {"rope_theta": 10000.0, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}

HF = HuggingFace(
    family="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    aliases=("llava",),  # LLaVA-1.5's first releases
    original=Original(name="llama", stem="Llama"),
    fields=FIELDS,
    # LLaVA exports of transformers 4 leave out what equals the config class's own defaults.
    defaults=DEFAULTS
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    # pretraining_tp > 1 would only re-order sums, in transformers 4.
    constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    moe_model_type="qwen2_moe",
)

LLAMA_2_7B = Backbone(
    name="llama-2-7b",
    source="https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    template="v1",
    hf=HF,
    mapping=MAPPING,
)
LLAMA_2_13B = replace(
    LLAMA_2_7B,
    name="llama-2-13b",
    source="https://huggingface.co/meta-llama/Llama-2-13b-hf/blob/main/config.json",
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=40,
)
VICUNA_7B = replace(
    LLAMA_2_7B, name="vicuna-7b-v1.5", source="https://huggingface.co/lmsys/vicuna-7b-v1.5/blob/main/config.json"
)
VICUNA_13B = replace(
    LLAMA_2_13B, name="vicuna-13b-v1.5", source="https://huggingface.co/lmsys/vicuna-13b-v1.5/blob/main/config.json"
)
LLAMA_3_8B = replace(
    LLAMA_2_7B,
    name="llama-3-8b",
    source="https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json",
    ffn_hidden_size=14336,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rotary_base=500000.0,
    template="llama_3",
)
LLAMA_3_1_SCALING = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
LLAMA_3_1_8B = replace(
    LLAMA_3_8B,
    name="llama-3.1-8b",
    source="https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json",
    max_position_embeddings=131072,
    rope_scaling=LLAMA_3_1_SCALING,
)
LLAMA_3_2_1B = replace(
    LLAMA_3_1_8B,
    name="llama-3.2-1b",
    source="https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json",
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    kv_channels=64,
    rope_scaling=replace(LLAMA_3_1_SCALING, factor=32.0),
    share_embeddings_and_output_weights=True,
)
LLAMA_3_2_3B = replace(
    LLAMA_3_2_1B,
    name="llama-3.2-3b",
    source="https://huggingface.co/meta-llama/Llama-3.2-3B/blob/main/config.json",
    num_layers=28,
    hidden_size=3072,
    num_attention_heads=24,
    kv_channels=128,
)
LLAMA_TINY = replace(
    LLAMA_2_7B,
    name="llama-tiny",
    source="this project: the quickstart and the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=2048,
)
LLAMA_NANO = replace(LLAMA_TINY, name="llama-nano", num_layers=2, hidden_size=64, ffn_hidden_size=128, kv_channels=16)
SIZES = (
    LLAMA_2_7B,
    LLAMA_2_13B,
    VICUNA_7B,
    VICUNA_13B,
    LLAMA_3_8B,
    LLAMA_3_1_8B,
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LLAMA_TINY,
    LLAMA_NANO,
)
