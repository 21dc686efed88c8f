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
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.inspection import count_parameters
from megatron_moellava.conversion.layout import ORIGINAL, entries
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import FAMILIES as TOWER_FAMILIES
from megatron_moellava.towers import TOWERS, get_tower, tower_fields, tower_from_fields
from megatron_moellava.towers.from_config import hf_config_of as tower_config_of
from megatron_moellava.towers.from_config import processor_config_of
from tests.helpers.paths import REPO

# MoE-LLaVA's table of parameters in billions (arXiv 2401.15947): placement -> (activated, total).
PUBLISHED = {
    "stablelm-2-1.6b": {None: (1.6, 1.6), "sparse": (2.0, 2.9), "dense": (2.5, 4.1)},
    "qwen-1.8b": {None: (1.8, 1.8), "sparse": (2.2, 3.1), "dense": (2.6, 4.3)},
    "phi-2": {None: (2.7, 2.7), "sparse": (3.6, 5.3), "dense": (4.5, 7.8)},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_config_json_and_fields_give_the_same_backbone_back(name):
    backbone = BACKBONES[name]
    config = json.loads(json.dumps(hf_config_of(backbone)))
    read = backbone_from_hf_config(config, FAMILIES, name=name)
    assert replace(read, source=backbone.source, template=backbone.template) == backbone
    assert backbone_from_fields(json.loads(json.dumps(backbone_fields(backbone))), FAMILIES) == backbone


@pytest.mark.parametrize("name", BACKBONES)
def test_mapping_table_covers_every_tensor_once(name):
    model = Model(backbone=BACKBONES[name], tower=get_tower("clip-tiny"), moe=MoEConfig(use_residual=True))
    lines = entries(model, ORIGINAL)
    outside = [name for line in lines for name in line.names]
    assert len({line.megatron for line in lines}) == len(lines)
    assert len(set(outside)) == len(outside)


@pytest.mark.parametrize(
    ("name", "placement", "activated", "total"),
    [(name, placement, *numbers) for name, rows in PUBLISHED.items() for placement, numbers in rows.items()],
)
def test_parameter_counts_are_the_published_ones(name, placement, activated, total):
    counts = count_parameters(
        Model(backbone=get_backbone(name), moe=MoEConfig(placement=placement) if placement else None)
    )
    # The paper cuts (Phi-2: 2.78 is printed as 2.7) as often as it rounds.
    assert counts.activated / 1e9 == pytest.approx(activated, abs=0.09)
    assert counts.total / 1e9 == pytest.approx(total, abs=0.09)


def test_published_experts_of_openchat():
    """The paper's OpenChat row starts 0.5 billion too low; what the experts add is right."""
    dense, sparse = (
        count_parameters(Model(backbone=get_backbone("openchat-3.5-1210"), moe=moe)).total / 1e9
        for moe in (None, MoEConfig())
    )
    assert sparse - dense == pytest.approx(15.2 - 6.7, abs=0.09)


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


def test_stablelm_epoch_spelling_gives_the_same_backbone():
    """MoE-LLaVA's StableLM follows the first release's config, with rope_pct and norm_eps."""
    config = hf_config_of(get_backbone("stablelm-2-1.6b"))
    old = {key: value for key, value in config.items() if key not in ("partial_rotary_factor", "layer_norm_eps")}
    old |= {"model_type": "stablelm_epoch", "rope_pct": 0.25, "norm_eps": 1e-5}
    assert backbone_from_hf_config(old, FAMILIES, name="x") == backbone_from_hf_config(config, FAMILIES, name="x")


@pytest.mark.parametrize("name", TOWERS)
def test_tower_folder_and_fields_give_the_same_tower_back(name, tmp_path):
    tower = TOWERS[name]
    (tmp_path / "config.json").write_text(json.dumps(tower_config_of(tower)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config_of(tower)))
    read = get_tower(f"{tmp_path}@original" if tower.drop_first_feature and not tower.class_token else str(tmp_path))
    assert replace(read, name=name, source=tower.source) == tower
    assert tower_from_fields(json.loads(json.dumps(tower_fields(tower))), TOWER_FAMILIES) == tower


def test_visual_tokens_of_the_published_towers():
    assert get_tower("clip-vit-large-patch14-336").num_features == 576
    assert get_tower("siglip-so400m-patch14-384").num_features == 729
    assert get_tower("siglip-so400m-patch14-384@original").num_features == 728
    assert get_tower("clip-vit-large-patch14-336").num_used_layers == 23
    assert get_tower("clip-vit-large-patch14-336").pad_color == (122, 116, 104)


# --- published configs ------------------------------------------------------------------------------------------------

# {"backbones" or "towers": {repository: {"name": ours, "but": fields that differ from it, "config": its config.json}}}
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
    assert published - names == ({"siglip-so400m-patch14-384-original"} if part == "towers" else set())


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("name", ["microsoft/phi-2", "Qwen/Qwen-1_8B", "mistralai/Mistral-7B-v0.1"])
def test_a_config_without_a_size_is_refused(name, field, tmp_path):
    """It must not silently get the size of another model of the family."""
    config = dict(PUBLISHED_CONFIGS["backbones"][name]["config"])
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=field):
        get_backbone(str(tmp_path))
