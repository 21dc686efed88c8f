"""Qwen3-MoE: Qwen3 with many narrow experts in every layer, and no shared one.

The weights of the chosen experts sum to 1 (`norm_topk_prob` true, as published).
"""

from dataclasses import replace

from megatron_moellava.backbones import qwen3
from megatron_moellava.backbones.backbone import Experts, HuggingFace, Original
from megatron_moellava.backbones.experts import SPARSE_STEP
from megatron_moellava.backbones.qwen2_moe import EXPERT_FIELDS
from megatron_moellava.config import MoEConfig

HF = HuggingFace(
    family="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    original=Original(name="qwen3_moe", stem="Qwen3Moe"),
    fields=qwen3.HF.fields,
    defaults={key: value for key, value in qwen3.HF.defaults.items() if key != "head_dim"},  # hidden / heads, as Llama
    constants=qwen3.HF.constants,
    inert=(*qwen3.HF.inert, "output_router_logits"),
    experts=Experts(
        fields=EXPERT_FIELDS | {"num_local_experts": "num_moe_experts"},  # as transformers 5 writes it
        defaults={
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "router_aux_loss_coef": 0.001,
        },
        layers=SPARSE_STEP,
        norm_topk_prob=False,
    ),
)

QWEN3_30B_A3B_EXPERTS = MoEConfig(
    num_moe_experts=128,
    moe_router_topk=8,
    placement="dense",
    moe_ffn_hidden_size=768,
    moe_aux_loss_coeff=0.001,
)
QWEN3_30B_A3B = replace(
    qwen3.QWEN3_4B,
    name="qwen3-30b-a3b",
    source="https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/config.json",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_query_groups=4,
    share_embeddings_and_output_weights=False,
    moe=QWEN3_30B_A3B_EXPERTS,
    hf=HF,
)
QWEN3_MOE_TINY = replace(
    qwen3.QWEN3_TINY,
    name="qwen3-moe-tiny",
    share_embeddings_and_output_weights=False,
    moe=replace(QWEN3_30B_A3B_EXPERTS, num_moe_experts=8, moe_router_topk=3, moe_ffn_hidden_size=96),
    hf=HF,
)
SIZES = (QWEN3_30B_A3B, QWEN3_MOE_TINY)
