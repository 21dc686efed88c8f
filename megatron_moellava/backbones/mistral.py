"""Mistral-7B and OpenChat-3.5 on it. Unlike Llama: grouped queries and, in v0.1, a sliding attention window.

The window (4096) does nothing for rows up to its length, and MoE-LLaVA trains with 2048; longer rows are refused.
OpenChat adds two tokens to the vocabulary.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original

HF = HuggingFace(
    family="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    original=Original(name="mistral", stem="Mistral"),
    fields={key: field for key, field in llama.FIELDS.items() if key != "rope_scaling"}
    | {"sliding_window": "sliding_window"},
    defaults=llama.DEFAULTS,
    constants={"hidden_act": "silu", "rope_scaling": None},
    moe_model_type="qwen2_moe",
)

OPENCHAT_3_5 = Backbone(
    name="openchat-3.5-1210",
    source="https://huggingface.co/openchat/openchat-3.5-1210/blob/main/config.json",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32002,
    max_position_embeddings=8192,
    sliding_window=4096,
    template="openchat",
    hf=HF,
    mapping=llama.MAPPING,
)
MISTRAL_7B = replace(
    OPENCHAT_3_5,
    name="mistral-7b-v0.1",
    source="https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json",
    vocab_size=32000,
    max_position_embeddings=32768,
    template="mistral",
)
MISTRAL_7B_3 = replace(
    MISTRAL_7B,
    name="mistral-7b-v0.3",
    source="https://huggingface.co/mistralai/Mistral-7B-v0.3/blob/main/config.json",
    vocab_size=32768,
    rotary_base=1e6,
    sliding_window=None,
)
MISTRAL_TINY = replace(
    MISTRAL_7B,
    name="mistral-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=2048,
    sliding_window=None,
)
SIZES = (OPENCHAT_3_5, MISTRAL_7B, MISTRAL_7B_3, MISTRAL_TINY)
