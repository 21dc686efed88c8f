"""Configs of transformers' LlavaForConditionalGeneration, and which model needs a modelling file."""

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import MoEConfig
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
    again = moe_config(config, read)
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
    assert config["auto_map"]["AutoModel"] == "modeling_moe_llava.MoELlavaModel"


def test_experts_on_llama_become_qwen2_moe_with_biases_of_zero():
    renamed = as_transformers(model("llama-tiny", MoEConfig())).backbone
    assert renamed.hf.family == "qwen2" and renamed.add_qkv_bias and not get_backbone("llama-tiny").add_qkv_bias
    assert as_transformers(model("llama-tiny")).backbone == get_backbone("llama-tiny")


@pytest.mark.parametrize(
    ("change", "means"),
    [
        ({"norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
        (
            {"shared_expert_intermediate_size": 8},
            {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True},
        ),
    ],
)
def test_experts_that_no_upcycling_makes_are_the_familys_own(change, means):
    config = export_config(as_transformers(model("qwen2-tiny", MoEConfig())), vocab_size=512, image_token=7, trained={})
    assert text_backbone(config, name="export").moe is None
    config["text_config"] |= change
    own = text_backbone(config, name="export")
    assert own.hf.family == "qwen2_moe" and moe_config(config, own) == own.moe
    assert {name: getattr(own.moe, name) for name in means} == means


@pytest.mark.parametrize(
    "name",
    [
        "mixtral-tiny",
        "qwen2-moe-tiny",
        "qwen3-moe-tiny",
        "olmoe-tiny",
        "dots1-tiny",
        "deepseek-v2-tiny",
        "deepseek-v3-tiny",
    ],
)
def test_a_family_with_experts_of_its_own_stays_what_it_is(name):
    given = model(name, get_backbone(name).moe)
    assert needs_modelling_file(given) == "" and as_transformers(given) == given
    text = export_config(given, vocab_size=512, image_token=7, trained={})["text_config"]
    assert text["architectures"] == [given.backbone.hf.architecture]
    read = text_backbone(text, name="export")
    assert read.moe == given.moe and read.hf == given.backbone.hf
