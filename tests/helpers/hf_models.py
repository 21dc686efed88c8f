"""Tiny random models of transformers, one per family, with the logits and gradients that transformers computes.

Two families are not in transformers: Qwen v1 is Qwen2 under other names, and MiniCPM is Llama with its three constants
multiplied into the weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALE_EMB, SCALE_DEPTH, DIM_MODEL_BASE = 12, 1.4, 16


def dense(model_class, config):
    def build(folder: Path) -> dict:
        model = randomised(model_class(config))
        model.save_pretrained(folder)
        return reference(model)

    return build


def phi(folder: Path) -> dict:
    """The original drops the bias of Phi's output layer, so it is zero here."""
    sizes = SIZES | {"num_key_value_heads": 4}
    model = randomised(PhiForCausalLM(PhiConfig(**sizes, resid_pdrop=0.0, partial_rotary_factor=0.5)))
    torch.nn.init.zeros_(model.lm_head.bias)
    model.save_pretrained(folder)
    expected = reference(model)
    del expected["gradients"]["lm_head.bias"]
    return expected


def qwen(folder: Path) -> dict:
    """Qwen v1: fused q, k, v; w2 is the gate; its config counts gate and up together."""
    sizes = SIZES | {"num_key_value_heads": 4}
    model = randomised(Qwen2ForCausalLM(Qwen2Config(**sizes, rms_norm_eps=1e-6)))
    expected = reference(model)
    expected["gradients"] = qwen_names(expected["gradients"])
    config = {
        "model_type": "qwen",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": 2 * sizes["intermediate_size"],
        "num_hidden_layers": sizes["num_hidden_layers"],
        "num_attention_heads": 4,
        "kv_channels": 16,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "no_bias": True,
        "tie_word_embeddings": False,
    }
    write(folder, qwen_names(model.state_dict()), config)
    return expected


def qwen_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "attn.c_attn")
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor.clone()
    return renamed


def minicpm(folder: Path) -> dict:
    """w' = w * scale in a Llama, so dL/dw = scale * dL/dw'; the tied embedding gets both of its gradients."""
    model = randomised(LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-5)))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    branch, head = SCALE_DEPTH / SIZES["num_hidden_layers"] ** 0.5, DIM_MODEL_BASE / SIZES["hidden_size"]
    scales = {name: branch for name in own if name.endswith(("o_proj.weight", "down_proj.weight"))}
    scales["model.embed_tokens.weight"] = SCALE_EMB
    folded = {name: tensor * scales.get(name, 1.0) for name, tensor in own.items()}
    model.load_state_dict(folded | {"lm_head.weight": own["model.embed_tokens.weight"] * head})
    expected = reference(model)
    gradients = {name: value * scales.get(name, 1.0) for name, value in expected["gradients"].items()}
    gradients["model.embed_tokens.weight"] += gradients.pop("lm_head.weight") * head
    config = SIZES | {
        "model_type": "minicpm",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "scale_emb": SCALE_EMB,
        "scale_depth": SCALE_DEPTH,
        "dim_model_base": DIM_MODEL_BASE,
    }
    write(folder, own, config)
    return expected | {"gradients": gradients}


def qwen2_moe(folder: Path) -> dict:
    """Experts in layers 0 and 2; inside LLaVA, since a language model alone has no layout with experts here."""
    text = Qwen2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1, 3],
        moe_intermediate_size=SIZES["intermediate_size"],
        shared_expert_intermediate_size=0,
        decoder_sparse_step=1,
        output_router_logits=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=95))
    model = randomised(model)
    model.save_pretrained(folder)
    tensors = {name: tensor for name, tensor in read(folder).items() if "shared_expert" not in name}  # of size zero
    save_file(tensors, folder / "model.safetensors")
    expected = reference(model)
    return expected | {"gradients": names_on_disk(expected["gradients"])}


def names_on_disk(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 stacks experts and moves prefixes in memory; files keep one tensor per expert and older names."""
    renamed = {}
    for name, gradient in gradients.items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(part.chunk(2) for part in gradient):
                renamed[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                renamed[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for expert, part in enumerate(gradient):
                renamed[name.replace("down_proj", f"{expert}.down_proj.weight")] = part
        elif "shared_expert" not in name:
            renamed[name] = gradient
    return renamed


BUILDERS = {
    "phi": phi,
    "stablelm": dense(StableLmForCausalLM, StableLmConfig(**SIZES, use_qkv_bias=True, partial_rotary_factor=0.25)),
    "llama": dense(LlamaForCausalLM, LlamaConfig(**SIZES, rms_norm_eps=1e-5)),
    "llama-3": dense(
        LlamaForCausalLM,
        LlamaConfig(
            **SIZES,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "mistral": dense(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen": qwen,
    "qwen2": dense(Qwen2ForCausalLM, Qwen2Config(**(SIZES | {"tie_word_embeddings": True}))),
    "qwen3": dense(Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32)),
    "minicpm": minicpm,
    "qwen2_moe": qwen2_moe,
}


def randomised(model):
    """Every parameter random and of a size that matters: norms around one, biases not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)
    return model.eval()


def reference(model) -> dict:
    """Logits [B, S, V] of random tokens, the mean cross-entropy of the next token, and all its gradients."""
    tokens_BS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    logits_BSV = model(input_ids=tokens_BS).logits
    loss = torch.nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"tokens": tokens_BS, "logits": logits_BSV.detach(), "loss": loss.item(), "gradients": gradients}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
