"""StableLM-2. Unlike Llama: LayerNorm with bias, rotary on a quarter of the channels, biases on q, k and v.

The same model has two spellings of its config: transformers' (`stablelm`) and the `stablelm_epoch` of its first
release, which MoE-LLaVA's own port follows (`rope_pct`, `norm_eps`). The paper's table prints Phi-2's sizes for it by
mistake; the real ones give its published parameter counts.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original
from megatron_moellava.mapping import QKV, Mapping, both

MAPPING = llama.decoder_mapping(
    qkv=both(QKV, *llama.SPLIT_QKV),
    norms=(
        *both(Mapping, f"{llama.LAYER}input_layernorm", f"{llama.HF_LAYER}input_layernorm"),
        *both(Mapping, f"{llama.LAYER}pre_mlp_layernorm", f"{llama.HF_LAYER}post_attention_layernorm"),
        *both(Mapping, "decoder.final_layernorm", "model.norm"),
    ),
)

HF = HuggingFace(
    family="stablelm",
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    original=Original(name="stablelm", stem="Stablelm", train_modules=("gate_proj", "up_proj", "down_proj", "wg")),
    aliases=("stablelm_epoch",),
    fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "norm_eps": "layernorm_epsilon",
        "layer_norm_eps": "layernorm_epsilon",
        "rope_theta": "rotary_base",
        "rope_pct": "rotary_percent",
        "partial_rotary_factor": "rotary_percent",
        "use_qkv_bias": "add_qkv_bias",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
    },
    defaults={
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "tie_word_embeddings": False,
        "hidden_dropout": 0.0,
    },
    constants={
        "hidden_act": "silu",
        "rope_scaling": None,
        "rotary_scaling_factor": 1.0,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    inert=("num_heads",),  # of the first release, which reads num_attention_heads
)

STABLELM_2_1_6B = Backbone(
    name="stablelm-2-1.6b",
    source="https://huggingface.co/stabilityai/stablelm-2-1_6b/blob/main/config.json",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=64,
    vocab_size=100352,
    max_position_embeddings=4096,
    normalization="LayerNorm",
    add_qkv_bias=True,
    rotary_percent=0.25,
    template="stablelm",
    hf=HF,
    mapping=MAPPING,
)
STABLELM_TINY = replace(
    STABLELM_2_1_6B,
    name="stablelm-2-tiny",
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
SIZES = (STABLELM_2_1_6B, STABLELM_TINY)
