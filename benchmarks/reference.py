"""A random LLaVA with Qwen2-MoE experts in every other layer (or dense), written by transformers and importable by us."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    hidden: int = 512
    layers: int = 8
    experts: int = 4  # 0: dense
    ffn: int = 1408
    vocabulary: int = 32000
    image: int = 84  # pixels; patches of 14
    tower_layers: int = 3
    tower_hidden: int = 64

    @property
    def image_id(self) -> int:
        return self.vocabulary - 1


def write_reference(folder: Path, sizes: Sizes):
    """transformers' model, random, and its folder."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, Qwen2MoeConfig

    shared = {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.hidden // 64,
        "num_key_value_heads": sizes.hidden // 64,
        "intermediate_size": sizes.ffn,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    if not sizes.experts:
        text = Qwen2Config(**shared)
    else:
        text = Qwen2MoeConfig(
            **shared,
            num_experts=sizes.experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=list(range(1, sizes.layers, 2)),
            moe_intermediate_size=sizes.ffn,
            shared_expert_intermediate_size=0,
        )
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_hidden,
        intermediate_size=4 * sizes.tower_hidden,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=2,
        image_size=sizes.image,
        patch_size=14,
    )
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=sizes.image_id)
    ).eval()
    with torch.no_grad():  # otherwise all logits are nearly the same, and rounding decides
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0 if "embed" in name or "lm_head" in name else 1.5)
    model.save_pretrained(folder)
    _drop_empty_shared_experts(folder / "model.safetensors")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def _drop_empty_shared_experts(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value for name, value in load_file(file).items() if "shared_expert" not in name}, file)
