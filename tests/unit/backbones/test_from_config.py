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
from megatron_moellava.towers import TOWERS, get_tower
from tests.helpers.paths import REPO

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


# --- published configs ------------------------------------------------------------------------------------------------

# {"backbones" or "towers": {repository: {"name": ours, "but": fields that differ from it, "config": its config.json}}}
# Those of DeepSeek-V2-Lite, DeepSeek-V3 and Moonlight are written down from memory, beside transformers' config classes.
PUBLISHED_CONFIGS = json.loads((REPO / "tests/published/configs.json").read_text())
PARTS = {"backbones": (get_backbone, BACKBONES), "towers": (get_tower, TOWERS)}


@pytest.mark.parametrize(
    ("part", "repository"), [(part, repository) for part, found in PUBLISHED_CONFIGS.items() for repository in found]
)
def test_a_published_config_is_read_from_any_path(part, repository, tmp_path):
    """As it is published, in every spelling that was: a folder of any name gives what the name gives."""
    entry, (get, known) = PUBLISHED_CONFIGS[part][repository], PARTS[part]
    folder = tmp_path / "models" / "some folder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(entry["config"]))
    named = known[entry["name"]]
    own = {"name": str(folder), "source": str(folder)} | ({"template": named.template} if part == "backbones" else {})
    read = get(str(folder))
    assert replace(read, **{name: value for name, value in own.items() if name == "template"}) == replace(
        named, **entry.get("but", {}), **{name: value for name, value in own.items() if name != "template"}
    )


@pytest.mark.parametrize("part", PARTS)
def test_the_published_config_of_every_known_size_is_here(part):
    _, known = PARTS[part]
    names = {entry["name"] for entry in PUBLISHED_CONFIGS[part].values()}
    published = {name for name, size in known.items() if size.source.startswith("https://")}
    missing = {"siglip-so400m-patch14-384-original", "siglip2-base-patch16-naflex", "siglip2-so400m-patch16-naflex"}
    missing |= {f"languagebind-{kind}-large-patch14" for kind in ("image", "video")}
    assert published - names == (missing if part == "towers" else set())


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("name", ["microsoft/phi-2", "Qwen/Qwen-1_8B", "mistralai/Mistral-7B-v0.1"])
def test_a_config_without_a_size_is_refused(name, field, tmp_path):
    """It must not silently get the size of another model of the family."""
    config = dict(PUBLISHED_CONFIGS["backbones"][name]["config"])
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=field):
        get_backbone(str(tmp_path))
