"""The published sizes of every family."""

import pytest

from megatron_moellava.backbones import (
    BACKBONES,
    FAMILIES,
    backbone_from_hf_config,
    get_backbone,
)
from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.config import MoEConfig
from megatron_moellava.conversion.inspection import count_parameters
from megatron_moellava.conversion.layout import ORIGINAL, TRANSFORMERS, entries
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower

PUBLISHED = {
    "stablelm-2-1.6b": {None: (1.6, 1.6), "sparse": (2.0, 2.9), "dense": (2.5, 4.1)},
    "qwen-1.8b": {None: (1.8, 1.8), "sparse": (2.2, 3.1), "dense": (2.6, 4.3)},
    "phi-2": {None: (2.7, 2.7), "sparse": (3.6, 5.3), "dense": (4.5, 7.8)},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_mapping_table_covers_every_tensor_once(name):
    moe = BACKBONES[name].moe
    model = Model(backbone=BACKBONES[name], tower=get_tower("clip-tiny"), moe=moe or MoEConfig(use_residual=True))
    lines = entries(model, TRANSFORMERS if moe else ORIGINAL)
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


# Billions, activated and total, as the models' own reports have them; two count as activated what others leave out.
OWN_EXPERTS = {
    "mixtral-8x7b-v0.1": (12.9, 46.7),
    "qwen1.5-moe-a2.7b": (2.7, 14.3),
    "qwen3-30b-a3b": (3.3, 30.5),
    "olmoe-1b-7b-0924": (1.3, 6.9),
    "deepseek-moe-16b": (2.8, 16.4),
    "deepseek-v2-lite": (2.66, 15.7),
    "deepseek-v3": (37.5, 671.0),
    "moonlight-16b-a3b": (2.9, 16.0),
}


@pytest.mark.parametrize("name", OWN_EXPERTS)
def test_parameter_counts_of_models_with_experts_of_their_own(name):
    counts = count_parameters(Model(backbone=BACKBONES[name], moe=BACKBONES[name].moe))
    activated, total = OWN_EXPERTS[name]
    assert counts.activated / 1e9 == pytest.approx(activated, abs=0.06)
    assert counts.total / 1e9 == pytest.approx(total, abs=0.06)


def test_published_experts_of_openchat():
    """The paper's OpenChat row starts 0.5 billion too low; what the experts add is right."""
    dense, sparse = (
        count_parameters(Model(backbone=get_backbone("openchat-3.5-1210"), moe=moe)).total / 1e9
        for moe in (None, MoEConfig())
    )
    assert sparse - dense == pytest.approx(15.2 - 6.7, abs=0.09)


def test_stablelm_epoch_spelling_gives_the_same_backbone():
    """MoE-LLaVA's StableLM follows the first release's config, with rope_pct and norm_eps."""
    config = hf_config_of(get_backbone("stablelm-2-1.6b"))
    old = {key: value for key, value in config.items() if key not in ("partial_rotary_factor", "layer_norm_eps")}
    old |= {"model_type": "stablelm_epoch", "rope_pct": 0.25, "norm_eps": 1e-5}
    assert backbone_from_hf_config(old, FAMILIES, name="x") == backbone_from_hf_config(config, FAMILIES, name="x")
