"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with many narrow experts, and a wide shared one behind a learned gate in every MoE layer.

The weights of the chosen experts are their probabilities among all experts, and do not sum to 1 (`norm_topk_prob` false).
Layers without experts, where a config names some, have a dense FFN of `intermediate_size`.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama, qwen2
from megatron_moellava.backbones.backbone import Experts, HuggingFace, Original
from megatron_moellava.backbones.experts import SPARSE_STEP
from megatron_moellava.config import MoEConfig

EXPERT_FIELDS = {
    "num_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "router_aux_loss_coef": "moe_aux_loss_coeff",
}

HF = HuggingFace(
    family="qwen2_moe",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    original=Original(name="qwen2_moe", stem="Qwen2Moe"),
    fields={key: field for key, field in llama.FIELDS.items() if key != "rope_scaling"},
    defaults=llama.DEFAULTS,
    constants={"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "qkv_bias": True},
    inert=("sliding_window", "max_window_layers", "output_router_logits"),
    experts=Experts(
        fields=EXPERT_FIELDS | {"shared_expert_intermediate_size": "moe_shared_expert_intermediate_size"},
        defaults={
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "router_aux_loss_coef": 0.001,
        },
        constants={"moe_shared_expert_gate": True},
        layers=SPARSE_STEP,
        norm_topk_prob=False,
        shared="shared_expert.",
    ),
)

QWEN1_5_MOE_A2_7B_EXPERTS = MoEConfig(
    num_moe_experts=60,
    moe_router_topk=4,
    placement="dense",
    moe_ffn_hidden_size=1408,
    moe_router_pre_softmax=True,
    moe_aux_loss_coeff=0.001,
    moe_shared_expert_intermediate_size=5632,
    moe_shared_expert_gate=True,
)
QWEN1_5_MOE_A2_7B = replace(
    qwen2.QWEN1_5_1_8B,
    name="qwen1.5-moe-a2.7b",
    source="https://huggingface.co/Qwen/Qwen1.5-MoE-A2.7B/blob/main/config.json",
    ffn_hidden_size=5632,
    max_position_embeddings=8192,
    moe=QWEN1_5_MOE_A2_7B_EXPERTS,
    hf=HF,
)
QWEN2_MOE_TINY = replace(
    qwen2.QWEN2_TINY,
    name="qwen2-moe-tiny",
    hf=HF,
    moe=replace(
        QWEN1_5_MOE_A2_7B_EXPERTS,
        num_moe_experts=8,
        moe_router_topk=3,
        placement=(0, 2, 3),
        moe_ffn_hidden_size=96,
        moe_shared_expert_intermediate_size=192,
    ),
)
SIZES = (QWEN1_5_MOE_A2_7B, QWEN2_MOE_TINY)
