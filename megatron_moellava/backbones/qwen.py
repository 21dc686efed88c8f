"""Qwen v1 (Qwen-1.8B). Unlike Llama: a fused `c_attn` [q; k; v] with bias, other names; `w2` is the gate, `w1` up.

`intermediate_size` in its config counts gate and up together, so the FFN is half of it. Dynamic NTK and log-n attention
scaling do nothing up to `seq_length` (8192), which is therefore the longest row.
The architecture is Qwen2's, so transformers' Qwen2 classes run its export.
"""

from dataclasses import replace

from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original
from megatron_moellava.mapping import Concat, FusedQKV, both, copy, weight

LAYER, HF_LAYER = "decoder.layers.{i}.", "transformer.h.{i}."

MAPPING = (
    copy("embedding.word_embeddings.weight", "transformer.wte.weight"),
    copy(f"{LAYER}input_layernorm.weight", f"{HF_LAYER}ln_1.weight"),
    *both(FusedQKV, f"{LAYER}self_attention.linear_qkv", f"{HF_LAYER}attn.c_attn"),
    copy(f"{LAYER}self_attention.linear_proj.weight", f"{HF_LAYER}attn.c_proj.weight"),
    copy(f"{LAYER}pre_mlp_layernorm.weight", f"{HF_LAYER}ln_2.weight"),
    *weight(Concat, f"{LAYER}mlp.linear_fc1", f"{HF_LAYER}mlp.w2", f"{HF_LAYER}mlp.w1"),
    copy(f"{LAYER}mlp.linear_fc2.weight", f"{HF_LAYER}mlp.c_proj.weight"),
    copy("decoder.final_layernorm.weight", "transformer.ln_f.weight"),
    copy("output_layer.weight", "lm_head.weight"),
)

HF = HuggingFace(
    family="qwen",
    model_type="qwen",
    architecture="QWenLMHeadModel",
    original=Original(name="qwen", stem="QWen", train_modules=("mlp.w1", "mlp.w2", "mlp.c_proj", "wg")),
    fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "kv_channels": "kv_channels",
        "vocab_size": "vocab_size",
        "seq_length": "max_position_embeddings",
        "layer_norm_epsilon": "layernorm_epsilon",
        "rotary_emb_base": "rotary_base",
        "attn_dropout_prob": "attention_dropout",
    },
    defaults={"layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000.0, "kv_channels": 128},
    constants={
        "no_bias": True,
        "rotary_pct": 1.0,
        "emb_dropout_prob": 0.0,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
    },
    # The two scalings: see above. The rest are kernels, caches and dtypes.
    inert=(
        "intermediate_size",
        "max_position_embeddings",
        "use_dynamic_ntk",
        "use_logn_attn",
        "onnx_safe",
        "bf16",
        "fp16",
        "fp32",
        "use_flash_attn",
        "softmax_in_fp32",
        "use_cache_quantization",
        "use_cache_kernel",
        "tokenizer_type",
    ),
    prefix="transformer.",
    moe_model_type="qwen2_moe",
    export_as="qwen2",
    read=lambda config: {"ffn_hidden_size": config["intermediate_size"] // 2},
    write=lambda backbone: {
        "intermediate_size": 2 * backbone.ffn_hidden_size,
        "max_position_embeddings": backbone.max_position_embeddings,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    },
)

QWEN_1_8B = Backbone(
    name="qwen-1.8b",
    source="https://huggingface.co/Qwen/Qwen-1_8B/blob/main/config.json",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5504,
    num_attention_heads=16,
    num_query_groups=16,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=8192,
    layernorm_epsilon=1e-6,
    add_qkv_bias=True,
    template="qwen",
    hf=HF,
    mapping=MAPPING,
)
QWEN_TINY = replace(
    QWEN_1_8B,
    name="qwen-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=2048,
)
SIZES = (QWEN_1_8B, QWEN_TINY)
