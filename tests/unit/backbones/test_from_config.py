"""Backbones and towers as data: published sizes, config.json in both directions, and nothing unsupported in silence."""

import json
from dataclasses import replace

import pytest

from megatron_moellava.backbones import (
    BACKBONES,
    FAMILIES,
    backbone_fields,
    backbone_from_fields,
    backbone_from_hf_config,
    get_backbone,
)
from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.config import ConfigError
from megatron_moellava.towers import get_tower

# MoE-LLaVA's table of parameters in billions (arXiv 2401.15947): placement -> (activated, total).


@pytest.mark.parametrize("name", BACKBONES)
def test_config_json_and_fields_give_the_same_backbone_back(name):
    backbone = BACKBONES[name]
    config = json.loads(json.dumps(hf_config_of(backbone)))
    read = backbone_from_hf_config(config, FAMILIES, name=name)
    assert replace(read, source=backbone.source, template=backbone.template) == backbone
    assert backbone_from_fields(json.loads(json.dumps(backbone_fields(backbone))), FAMILIES) == backbone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"model_type": "gemma2"}, "gemma2"),
    ],
)
def test_unsupported_config_is_an_error_that_names_the_key(change, message):
    config = hf_config_of(get_backbone("llama-tiny")) | change
    with pytest.raises(ConfigError, match=message):
        backbone_from_hf_config(config, FAMILIES, name="folder")


def test_missing_size_in_config_is_named():
    config = hf_config_of(get_backbone("mistral-tiny"))
    del config["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size"):
        backbone_from_hf_config(config, FAMILIES, name="folder")


def test_unknown_name_lists_the_nearest():
    with pytest.raises(ConfigError, match="phi-2"):
        get_backbone("phi2")
    with pytest.raises(ConfigError, match="clip-vit-large-patch14-336"):
        get_tower("clip-vit-large-336")
