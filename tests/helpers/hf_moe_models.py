"""Tiny random language models of transformers whose own layers have experts, with the logits and gradients it computes."""

import re
from pathlib import Path

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from tests.helpers.hf_models import SIZES, randomised, reference, write

WIDTH = 32  # of a routed expert, where it is not the dense FFN's
NARROW = {"num_experts": 8, "num_experts_per_tok": 3}


def mixtral() -> MixtralForCausalLM:
    """Two experts of weights that sum to 1."""
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def qwen2_moe() -> Qwen2MoeForCausalLM:
    """Weights that do not sum to 1, a shared expert with its gate, and a layer without experts."""
    config = Qwen2MoeConfig(
        **SIZES,
        **NARROW,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[1],
        norm_topk_prob=False,
    )
    return Qwen2MoeForCausalLM(config)


def qwen3_moe() -> Qwen3MoeForCausalLM:
    """Experts in every other layer only, as `decoder_sparse_step` says."""
    config = Qwen3MoeConfig(
        **SIZES, **NARROW, head_dim=24, moe_intermediate_size=WIDTH, norm_topk_prob=True, decoder_sparse_step=2
    )
    return Qwen3MoeForCausalLM(config)


def olmoe() -> OlmoeForCausalLM:
    """A norm over all heads together, which tensor parallelism divides."""
    return OlmoeForCausalLM(OlmoeConfig(**SIZES, **NARROW, norm_topk_prob=False))


def dots1(n_group: int = 4, topk_group: int = 2) -> Dots1ForCausalLM:
    """Sigmoids, biases that decide, the best two of four groups, scaled weights, a shared expert, and a dense first layer."""
    config = Dots1Config(
        **SIZES,
        head_dim=24,
        n_routed_experts=8,
        num_experts_per_tok=4,
        moe_intermediate_size=WIDTH,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    return with_biases(Dots1ForCausalLM(config))


def with_biases(model):
    """The same with expert biases that decide."""
    generator = torch.Generator().manual_seed(7)
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


# Heads of queries and keys, of their rotated part, and of values have three sizes; YaRN's ramp lies within the few channels.
LATENT = {
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": SIZES["num_attention_heads"],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 4096}


def deepseek_v2() -> DeepseekV2ForCausalLM:
    """Multi-latent attention whose queries have no latent, YaRN, scaled weights that do not sum to 1, and a shared expert."""
    config = DeepseekV2Config(
        **SIZES | LATENT,
        q_lora_rank=None,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=WIDTH,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    )
    return DeepseekV2ForCausalLM(config)


def deepseek_v3(
    q_lora_rank: int | None = 24, yarn: bool = True, epsilon: float = 1e-3, **changes
) -> DeepseekV3ForCausalLM:
    """Queries with a latent, sigmoids and groups as in dots.llm1; the latents' norms have an epsilon of their own."""
    scaling = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5} if yarn else None
    settings = {
        "q_lora_rank": q_lora_rank,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": WIDTH,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": epsilon,
        "rope_parameters": scaling,
    }
    return with_biases(DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | LATENT | settings | changes)))


def deepseek_moe() -> LlamaForCausalLM:
    """transformers has the layers, if not the model: those of Llama, with the experts of DeepSeek-V2."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-6))
    experts = DeepseekV2Config(
        **SIZES,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=WIDTH,
        n_shared_experts=2,
        routed_scaling_factor=1.0,
    )
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(experts)
    return model


DEEPSEEK = SIZES | {
    "model_type": "deepseek",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
}
MODELS = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "dots1": dots1,
    "deepseek_moe": deepseek_moe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


def saved(name: str, folder: Path):
    """The model, whose files are in `folder`."""
    model = randomised(MODELS[name]())
    if name == "deepseek_moe":
        write(folder, {key: value.contiguous() for key, value in in_files(model.state_dict(), name).items()}, DEEPSEEK)
    else:
        model.save_pretrained(folder)
    return model


def builder(name: str):
    """As `hf_models.BUILDERS` have them: writes the model, returns what transformers computes, by the names in its files."""

    def build(folder: Path) -> dict:
        expected = reference(saved(name, folder))
        return expected | {"gradients": in_files(expected["gradients"], name)}

    return build


BUILDERS = {f"native {name}": builder(name) for name in MODELS}


def in_files(tensors: dict, name: str) -> dict:
    """In memory transformers 5 keeps all experts of a layer in two tensors; in files each has its own, Mixtral's under the
    names that were published."""
    renamed = {}
    for key, value in tensors.items():
        if key.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(value):
                gate, up = expert.chunk(2)
                renamed[key.replace("gate_up_proj", f"{number}.gate_proj.weight")] = gate
                renamed[key.replace("gate_up_proj", f"{number}.up_proj.weight")] = up
        elif key.endswith("experts.down_proj"):
            for number, expert in enumerate(value):
                renamed[key.replace("down_proj", f"{number}.down_proj.weight")] = expert
        else:
            renamed[key] = value
    return {published(key): value for key, value in renamed.items()} if name == "mixtral" else renamed


def published(key: str) -> str:
    """A tensor of Mixtral as its files call it."""
    key = key.replace(".mlp.", ".block_sparse_moe.")
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return re.sub(r"(experts\.\d+\.)(\w+)\.", lambda found: f"{found[1]}{names[found[2]]}.", key)
