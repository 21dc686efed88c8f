"""Mixtral: Mistral whose every layer has experts, two of eight for each token, as wide as a dense FFN would be.

The weights of the two sum to 1 (a softmax over their logits). In files an expert's matrices are w1 (gate), w3 (up) and w2
(down), in a module of another name than that of a dense layer.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama, mistral
from megatron_moellava.backbones.backbone import Experts, HuggingFace, Original
from megatron_moellava.backbones.experts import EVERY_LAYER
from megatron_moellava.config import MoEConfig
from megatron_moellava.mapping import QKV, weight

MAPPING = llama.decoder_mapping(qkv=weight(QKV, *llama.SPLIT_QKV), norms=llama.RMS_NORMS, ffn=("w1", "w3", "w2"))

HF = HuggingFace(
    family="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    # MoE-LLaVA starts from dense models; these are names in its manner, as of all families with experts of their own.
    original=Original(name="mixtral", stem="Mixtral", train_modules=("w1", "w2", "w3", "wg")),
    fields=mistral.HF.fields,
    defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    constants={"hidden_act": "silu", "rope_scaling": None, "router_jitter_noise": 0.0},
    inert=("output_router_logits",),  # whether transformers adds the balancing loss
    experts=Experts(
        fields={
            "num_local_experts": "num_moe_experts",
            "num_experts_per_tok": "moe_router_topk",
            "router_aux_loss_coef": "moe_aux_loss_coeff",
        },
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
        layers=EVERY_LAYER,
        module="block_sparse_moe.",
    ),
)

MIXTRAL_8X7B = replace(
    mistral.MISTRAL_7B,
    name="mixtral-8x7b-v0.1",
    source="https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json",
    rotary_base=1e6,
    sliding_window=None,
    moe=MoEConfig(num_moe_experts=8, moe_router_topk=2, placement="dense", moe_aux_loss_coeff=0.02),
    hf=HF,
    mapping=MAPPING,
)
MIXTRAL_TINY = replace(
    mistral.MISTRAL_TINY,
    name="mixtral-tiny",
    ffn_hidden_size=192,
    rotary_base=1e6,
    moe=MoEConfig(num_moe_experts=4, moe_router_topk=2, placement="dense", moe_aux_loss_coeff=0.02),
    hf=HF,
    mapping=MAPPING,
)
SIZES = (MIXTRAL_8X7B, MIXTRAL_TINY)
