"""OLMoE: Llama with many narrow experts in every layer, and an RMSNorm over all heads of q together, and one of k.

The weights of the chosen experts are their probabilities among all experts, and do not sum to 1. `intermediate_size` is the
width of an expert. `clip_qkv` is unset in the published models.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama, qwen3
from megatron_moellava.backbones.backbone import Experts, HuggingFace, Original
from megatron_moellava.backbones.experts import EVERY_LAYER
from megatron_moellava.config import MoEConfig

HF = HuggingFace(
    family="olmoe",
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    original=Original(name="olmoe", stem="Olmoe"),
    fields={key: field for key, field in llama.FIELDS.items() if key not in ("rope_scaling", "head_dim")},
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5},
    constants={"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "clip_qkv": None},
    inert=("output_router_logits",),
    experts=Experts(
        fields={
            "num_experts": "num_moe_experts",
            "num_experts_per_tok": "moe_router_topk",
            "router_aux_loss_coef": "moe_aux_loss_coeff",
        },
        defaults={"num_experts": 64, "num_experts_per_tok": 8, "router_aux_loss_coef": 0.01},
        layers=EVERY_LAYER,
        norm_topk_prob=False,
    ),
)

OLMOE_1B_7B_EXPERTS = MoEConfig(
    num_moe_experts=64,
    moe_router_topk=8,
    placement="dense",
    moe_router_pre_softmax=True,
    moe_aux_loss_coeff=0.01,
)
OLMOE_1B_7B = replace(
    llama.LLAMA_2_7B,
    name="olmoe-1b-7b-0924",
    source="https://huggingface.co/allenai/OLMoE-1B-7B-0924/blob/main/config.json",
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=1024,
    num_attention_heads=16,
    num_query_groups=16,
    vocab_size=50304,
    qk_layernorm=True,
    qk_layernorm_spans_heads=True,
    moe=OLMOE_1B_7B_EXPERTS,
    hf=HF,
    mapping=qwen3.MAPPING,
)
OLMOE_TINY = replace(
    OLMOE_1B_7B,
    name="olmoe-tiny",
    source="this project: the tests",
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=512,
    max_position_embeddings=2048,
    moe=replace(OLMOE_1B_7B_EXPERTS, num_moe_experts=8, moe_router_topk=3),
)
SIZES = (OLMOE_1B_7B, OLMOE_TINY)
