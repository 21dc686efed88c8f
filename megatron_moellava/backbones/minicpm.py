"""MiniCPM-2B. Unlike Llama: three scalings (embeddings, residual branches, logits) and tied embeddings.

The original applies `scale_emb` only when it is given token ids, so never to a multimodal row; the field says what
the text model does, and model/layers.py has the switch. transformers has no class for it: exports carry a modelling
file.
"""

import math
from dataclasses import replace

from megatron_moellava.backbones import llama
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original


def read(config: dict) -> dict:
    """Our fields from config.json: scale_depth / sqrt(layers) for branches, width / base for logits."""
    depth, base = config.get("scale_depth"), config.get("dim_model_base")
    return {
        "residual_multiplier": depth / math.sqrt(config["num_hidden_layers"]) if depth else 1.0,
        "logits_divisor": config["hidden_size"] / base if base else 1.0,
    }


def write(backbone: Backbone) -> dict:
    """The inverse of `read`: MiniCPM's own fields of config.json."""
    return {
        # Rounded, so that 1.4 / sqrt(40) * sqrt(40) is written as the 1.4 that was published.
        "scale_depth": round(backbone.residual_multiplier * math.sqrt(backbone.num_layers), 6),
        "dim_model_base": round(backbone.hidden_size / backbone.logits_divisor),
    }


HF = HuggingFace(
    family="minicpm",
    model_type="minicpm",
    architecture="MiniCPMForCausalLM",
    original=Original(name="minicpm", stem="MiniCPM"),
    fields={key: field for key, field in llama.FIELDS.items() if key not in ("rope_scaling", "head_dim")}
    | {"scale_emb": "embedding_multiplier"},
    defaults=llama.DEFAULTS | {"tie_word_embeddings": True},
    constants={"hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1, "rope_scaling": None},
    inert=("scale_depth", "dim_model_base"),
    read=read,
    write=write,
)

MINICPM_2B = Backbone(
    name="minicpm-2b",
    source="https://huggingface.co/openbmb/MiniCPM-2B-sft-bf16/blob/main/config.json",
    num_layers=40,
    hidden_size=2304,
    ffn_hidden_size=5760,
    num_attention_heads=36,
    num_query_groups=36,
    kv_channels=64,
    vocab_size=122753,
    max_position_embeddings=4096,
    share_embeddings_and_output_weights=True,
    embedding_multiplier=12.0,
    residual_multiplier=1.4 / math.sqrt(40),
    logits_divisor=2304 / 256,
    template="minicpm",
    hf=HF,
    mapping=llama.MAPPING,
)
MINICPM_TINY = replace(
    MINICPM_2B,
    name="minicpm-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=2048,
    residual_multiplier=1.4 / math.sqrt(4),
    logits_divisor=128 / 64,
)
SIZES = (MINICPM_2B, MINICPM_TINY)
