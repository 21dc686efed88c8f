"""dots.llm1: Qwen3's attention, and the experts of DeepSeek-V3: sigmoid scores, chosen by score plus a bias that is learned
without a gradient, perhaps among the best groups of experts, weights that sum to a scaling factor, and a shared expert.

The first layers have a dense FFN. The shared expert is as wide as `n_shared_experts` routed ones.
"""

from dataclasses import replace

from megatron_moellava.backbones import llama, qwen3
from megatron_moellava.backbones.backbone import Experts, HuggingFace, Original
from megatron_moellava.backbones.experts import FIRST_DENSE
from megatron_moellava.config import ConfigError, MoEConfig


def read(config: dict) -> dict:
    """Nothing more; ConfigError where some layers would have a sliding window."""
    window, first = config.get("sliding_window"), config.get("max_window_layers") or 0
    if window and first < config["num_hidden_layers"] and "layer_types" not in config:
        raise ConfigError(
            f"sliding_window={window} from layer {first} (max_window_layers) on: only full attention is supported"
        )
    return {}


EXPERTS = Experts(
    fields={
        "n_routed_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
        "n_group": "moe_router_num_groups",
        "topk_group": "moe_router_group_topk",
    },
    defaults={"moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
    # Balanced by the biases alone.
    constants={"moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "none"},
    layers=FIRST_DENSE,
    norm_topk_prob=False,
    shared_count="n_shared_experts",
)
HF = HuggingFace(
    family="dots1",
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    original=Original(name="dots1", stem="Dots1"),
    fields=qwen3.HF.fields,
    defaults=llama.DEFAULTS,
    constants={"hidden_act": "silu", "rope_scaling": None, "attention_bias": False},
    # The windows: see `read`, and the layers' types. The other says whether transformers adds the balancing loss.
    inert=("sliding_window", "max_window_layers", "output_router_logits"),
    read=read,
    experts=EXPERTS,
)

DOTS1_TINY_EXPERTS = MoEConfig(
    num_moe_experts=8,
    moe_router_topk=4,
    placement=(1, 2, 3),
    moe_ffn_hidden_size=96,
    moe_router_topk_scaling_factor=2.5,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="none",
    moe_shared_expert_intermediate_size=192,
)
DOTS1_TINY = replace(
    qwen3.QWEN3_TINY,
    name="dots1-tiny",
    moe=DOTS1_TINY_EXPERTS,
    share_embeddings_and_output_weights=False,
    hf=HF,
)
SIZES = (DOTS1_TINY,)
