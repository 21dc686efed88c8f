"""DeepSeekMoE (16B): Llama with many narrow experts and a shared one in every layer but the first.

The weights of the chosen experts are their probabilities among all experts, and do not sum to 1. The shared expert is as wide
as `n_shared_experts` routed ones, and has no gate. transformers has no such class: exports carry a modelling file.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama
from megatron_moellava.backbones.backbone import Experts, HuggingFace, Original
from megatron_moellava.backbones.experts import FIRST_DENSE
from megatron_moellava.config import MoEConfig

EXPERTS = Experts(
    fields={
        "n_routed_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "aux_loss_alpha": "moe_aux_loss_coeff",
    },
    defaults={"moe_intermediate_size": 1407, "aux_loss_alpha": 0.001},
    constants={"moe_router_load_balancing_type": "seq_aux_loss"},
    layers=FIRST_DENSE,
    norm_topk_prob=False,
    shared_count="n_shared_experts",
)
HF = HuggingFace(
    family="deepseek_moe",
    model_type="deepseek",
    architecture="DeepseekForCausalLM",
    original=Original(name="deepseek", stem="Deepseek"),
    fields={key: field for key, field in llama.FIELDS.items() if key not in ("rope_scaling", "head_dim")},
    defaults=llama.DEFAULTS,
    constants={
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "pretraining_tp": 1,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "seq_aux": True,
    },
    export_as="llama",
    experts=EXPERTS,
)

DEEPSEEK_MOE_16B_EXPERTS = MoEConfig(
    num_moe_experts=64,
    moe_router_topk=6,
    placement=tuple(range(1, 28)),
    moe_ffn_hidden_size=1408,
    moe_router_pre_softmax=True,
    moe_aux_loss_coeff=0.001,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_shared_expert_intermediate_size=2816,
)
DEEPSEEK_MOE_16B = replace(
    llama.LLAMA_2_7B,
    name="deepseek-moe-16b",
    source="https://huggingface.co/deepseek-ai/deepseek-moe-16b-base/blob/main/config.json",
    num_layers=28,
    hidden_size=2048,
    ffn_hidden_size=10944,
    num_attention_heads=16,
    num_query_groups=16,
    vocab_size=102400,
    layernorm_epsilon=1e-6,
    moe=DEEPSEEK_MOE_16B_EXPERTS,
    hf=HF,
)
DEEPSEEK_MOE_TINY = replace(
    llama.LLAMA_TINY,
    name="deepseek-moe-tiny",
    num_query_groups=2,
    layernorm_epsilon=1e-6,
    hf=HF,
    moe=replace(
        DEEPSEEK_MOE_16B_EXPERTS,
        num_moe_experts=8,
        moe_router_topk=3,
        placement=(1, 2, 3),
        moe_ffn_hidden_size=96,
        moe_shared_expert_intermediate_size=192,
    ),
)
SIZES = (DEEPSEEK_MOE_16B, DEEPSEEK_MOE_TINY)
