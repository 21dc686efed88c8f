"""LFM2-VL's config.json: what it says of a model, and what is refused. tests/parity runs such exports in transformers."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.native import native_config, tower_with_projector
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower

LLAMA = get_backbone("llama-tiny")


@pytest.mark.parametrize("name", ["naflex-tiny", "naflex-tiny@pixel_shuffle"])
def test_the_tower_of_an_export_is_the_tower_of_the_model(name):
    tower = get_tower(name)
    trained = {"data": {"max_image_tokens": 64, "template": "v1"}}
    config = native_config(Model(backbone=LLAMA, tower=tower), 512, 511, trained, has_head=False)
    assert config["trained_with"] == {"data": {"max_image_tokens": 64, "template": "v1"}}
    assert config["vision_config"]["vision_use_head"] is False and config["downsample_factor"] == tower.shuffle
    plain = replace(tower, projector="mlp2x_gelu")
    assert tower_with_projector(plain, config).projector == tower.projector


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("downsample_factor", 4, "downsample_factor=4: supported are 1, 2"),
        ("projector_use_layernorm", True, "projector_use_layernorm=True: only False"),
        ("projector_hidden_act", "silu", "projector_hidden_act='silu': only 'gelu'"),
        ("projector_hidden_size", 7, "projector_hidden_size=7: only the language model's"),
    ],
)
def test_another_projector_is_refused(key, value, message):
    config = native_config(Model(backbone=LLAMA, tower=get_tower("naflex-tiny")), 512, 511, {}, has_head=True)
    assert tower_with_projector(get_tower("naflex-tiny"), config).shuffle == 1
    with pytest.raises(ConfigError, match=message):
        tower_with_projector(get_tower("naflex-tiny"), config | {key: value})
    absent = {name: item for name, item in config.items() if name != "projector_use_layernorm"}
    with pytest.raises(ConfigError, match="projector_use_layernorm=True"):  # what an absent key means there
        tower_with_projector(get_tower("naflex-tiny"), absent)


def test_a_model_that_transformers_cannot_run_alone_has_no_such_export():
    model = Model(backbone=LLAMA, tower=get_tower("naflex-tiny"), moe=MoEConfig(use_residual=True))
    with pytest.raises(ConfigError, match="no residual MoE, and there is no modelling file for towers at native"):
        native_config(model, 512, 511, {}, has_head=True)
