"""How a Megatron checkpoint and a naming scheme correspond, tensor by tensor."""

import itertools
import math

import pytest

from megatron_moellava.backbones import FAMILIES, get_backbone
from megatron_moellava.config import MoEConfig
from megatron_moellava.conversion.layout import LLAVA, ORIGINAL, TRANSFORMERS, entries
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower

TINY = [next(size.name for size in family.SIZES if "tiny" in size.name) for family in FAMILIES]


@pytest.mark.parametrize("moe", [None, MoEConfig(), MoEConfig(use_residual=True)], ids=["dense", "moe", "residual"])
@pytest.mark.parametrize("layout", [ORIGINAL, TRANSFORMERS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("backbone", TINY)
def test_every_element_has_one_place_on_both_sides(backbone, layout, moe):
    model = Model(backbone=get_backbone(backbone), tower=get_tower("clip-tiny"), moe=moe)
    for entry in entries(model, layout):
        assert sum(span.count for span in entry.spans) == math.prod(entry.shape), entry.megatron
        covered = {}
        for span in entry.spans:
            covered.setdefault(span.tensor, []).append((span.start, span.start + span.count))
        for number, shape in enumerate(entry.shapes):
            places = sorted(covered[number])
            assert places[0][0] == 0 and places[-1][1] == math.prod(shape), entry.names[number]
            assert all(a[1] == b[0] for a, b in itertools.pairwise(places)), "no gap, no overlap"


def test_experts_are_spelt_one_by_one_outside_and_are_one_tensor_inside():
    model = Model(backbone=get_backbone("llama-tiny"), tower=get_tower("clip-tiny"), moe=MoEConfig())
    lines = {entry.megatron: entry for entry in entries(model, ORIGINAL)}
    fc2 = lines["language_model.decoder.layers.0.mlp.experts.experts.linear_fc2.weight"]
    assert fc2.shape[0] == 4 and fc2.names == tuple(
        f"model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.{k}.down_proj.weight" for k in range(4)
    )
    dense = lines["language_model.decoder.layers.1.mlp.linear_fc2.weight"]
    assert dense.names == ("model.layers.1.mlp.down_proj.weight",)


def test_layouts_differ_by_their_names_alone():
    model = Model(backbone=get_backbone("llama-tiny"), tower=get_tower("clip-tiny"))
    names = {
        layout.name: {entry.megatron: entry.names[0] for entry in entries(model, layout)}
        for layout in (LLAVA, ORIGINAL)
    }
    projector = "projector.linear_fc1.weight"
    assert names["llava"][projector] == "model.mm_projector.0.weight"
    assert names["original"][projector] == "model.mm_projector.image_spatial_proj.0.weight"
    assert names["llava"].keys() == names["original"].keys()
