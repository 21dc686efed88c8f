"""Configs of transformers' LlavaForConditionalGeneration, and which model needs a modelling file."""

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.huggingface import (
    as_transformers,
    export_config,
    moe_config,
    needs_modelling_file,
    text_backbone,
)
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower


def model(backbone: str, moe: MoEConfig | None = None) -> Model:
    return Model(backbone=get_backbone(backbone), tower=get_tower("clip-tiny"), moe=moe)


@pytest.mark.parametrize(
    ("backbone", "moe", "reason"),
    [
        ("llama-tiny", None, ""),
        ("llama-tiny", MoEConfig(), ""),
        ("qwen3-tiny", MoEConfig(), ""),
        ("phi-2-tiny", None, ""),
        ("minicpm-tiny", None, "minicpm scales embeddings, residual branches and logits"),
        ("phi-2-tiny", MoEConfig(), "transformers has no phi with experts"),
        ("stablelm-2-tiny", MoEConfig(), "transformers has no stablelm with experts"),
        ("llama-tiny", MoEConfig(use_residual=True), "transformers has no residual MoE"),
    ],
)
def test_stock_transformers_runs_what_it_can_compute(backbone, moe, reason):
    found = needs_modelling_file(model(backbone, moe))
    assert (reason in found) if reason else found == ""


@pytest.mark.parametrize("backbone", ["llama-tiny", "mistral-tiny", "qwen2-tiny", "qwen3-tiny"])
@pytest.mark.parametrize(
    "moe",
    [
        None,
        MoEConfig(),
        MoEConfig(placement=(1, 3), num_moe_experts=6),
        MoEConfig(num_moe_experts=8, moe_router_topk=4, moe_ffn_hidden_size=96),
        MoEConfig(moe_router_topk=1, normalize_top1=True),
        MoEConfig(moe_router_topk=1),
    ],
)
def test_an_exported_config_is_read_as_the_same_model(backbone, moe):
    given = as_transformers(model(backbone, moe))
    config = export_config(given, vocab_size=given.backbone.vocab_size, image_token=7, trained={})
    assert config["image_token_index"] == 7 and config["image_seq_length"] == given.tower.num_features
    read = text_backbone(config, name="export")
    for field in ("hidden_size", "num_layers", "ffn_hidden_size", "rotary_base", "qk_layernorm", "add_qkv_bias"):
        assert getattr(read, field) == getattr(given.backbone, field), field
    again = moe_config(config)
    if moe is None:
        assert again is None
    else:
        assert (again.num_moe_experts, again.moe_router_topk) == (moe.num_moe_experts, moe.moe_router_topk)
        assert again.placement == given.moe_layers
        assert (again.moe_ffn_hidden_size, again.normalize_top1) == (moe.moe_ffn_hidden_size, moe.normalize_top1)


def test_a_model_that_needs_code_says_which(tmp_path):
    config = export_config(as_transformers(model("phi-2-tiny", MoEConfig())), vocab_size=512, image_token=7, trained={})
    assert config["model_type"] == "moe_llava" and config["moe_layers"] == [0, 2]
    assert config["auto_map"]["AutoConfig"].startswith("modeling_moe_llava.")


def test_experts_on_llama_become_qwen2_moe_with_biases_of_zero():
    renamed = as_transformers(model("llama-tiny", MoEConfig())).backbone
    assert renamed.hf.family == "qwen2" and renamed.add_qkv_bias and not get_backbone("llama-tiny").add_qkv_bias
    assert as_transformers(model("llama-tiny")).backbone == get_backbone("llama-tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob must be true"),
        ({"shared_expert_intermediate_size": 8}, "no shared expert"),
    ],
)
def test_experts_that_compute_otherwise_are_refused(change, message):
    config = export_config(as_transformers(model("qwen2-tiny", MoEConfig())), vocab_size=512, image_token=7, trained={})
    with pytest.raises(ConfigError, match=message):
        moe_config(config | {"text_config": config["text_config"] | change})
