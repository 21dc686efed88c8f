"""Phi-2. Unlike Llama: parallel residual with one LayerNorm per layer, partial rotary (32 of 80 channels), biases
everywhere, and a plain MLP with the tanh-approximated GELU.

MoE-LLaVA's LlavaPhi has no bias on the output layer and drops the published `lm_head.bias` on loading, so that is the
default here; `output_layer_bias=True` (import with `--keep-output-bias`) is the published text model. The published
config has resid_pdrop 0.1, which is active in train mode.
"""

from dataclasses import replace

from megatron_moellava.backbones.backbone import Backbone, HuggingFace, Original
from megatron_moellava.mapping import QKV, Mapping, both, copy

LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."

MAPPING = (
    copy("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    *both(Mapping, f"{LAYER}input_layernorm", f"{HF_LAYER}input_layernorm"),
    *both(QKV, f"{LAYER}self_attention.linear_qkv", *(f"{HF_LAYER}self_attn.{name}_proj" for name in "qkv")),
    *both(Mapping, f"{LAYER}self_attention.linear_proj", f"{HF_LAYER}self_attn.dense"),
    *both(Mapping, f"{LAYER}mlp.linear_fc1", f"{HF_LAYER}mlp.fc1"),
    *both(Mapping, f"{LAYER}mlp.linear_fc2", f"{HF_LAYER}mlp.fc2"),
    *both(Mapping, "decoder.final_layernorm", "model.final_layernorm"),
    *both(Mapping, "output_layer", "lm_head"),
)

HF = HuggingFace(
    family="phi",
    model_type="phi",
    architecture="PhiForCausalLM",
    original=Original(name="phi", stem="Phi", train_modules=("fc1", "fc2", "wg")),
    fields={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_eps": "layernorm_epsilon",
        "rope_theta": "rotary_base",
        "partial_rotary_factor": "rotary_percent",
        "attention_dropout": "attention_dropout",
        "resid_pdrop": "hidden_dropout",
    },
    defaults={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "resid_pdrop": 0.0},
    constants={
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
        "embd_pdrop": 0.0,
        "tie_word_embeddings": False,
        "rope_scaling": None,
    },
    drops=("lm_head.bias",),
)

PHI_2 = Backbone(
    name="phi-2",
    source="https://huggingface.co/microsoft/phi-2/blob/main/config.json",
    num_layers=32,
    hidden_size=2560,
    ffn_hidden_size=10240,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=80,
    vocab_size=51200,
    max_position_embeddings=2048,
    normalization="LayerNorm",
    activation="gelu_tanh",
    gated_linear_unit=False,
    add_bias_linear=True,
    add_qkv_bias=True,
    rotary_percent=0.4,
    parallel_residual=True,
    hidden_dropout=0.1,
    template="phi",
    hf=HF,
    mapping=MAPPING,
)
PHI_2_TINY = replace(
    PHI_2,
    name="phi-2-tiny",
    source="this project: the quickstart and the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=512,
    rotary_percent=0.5,
    hidden_dropout=0.0,
)
SIZES = (PHI_2, PHI_2_TINY)
