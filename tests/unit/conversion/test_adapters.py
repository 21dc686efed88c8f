"""Every element of our adapters is one of a tensor of `peft`, once."""

from collections import defaultdict
from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import LoraConfig, MoEConfig
from megatron_moellava.conversion.adapters import fused_matrices, fused_names, lines
from megatron_moellava.conversion.layout import LANGUAGE_MODEL, ORIGINAL, OWN
from megatron_moellava.costs.adapters import adapter_tensors
from megatron_moellava.costs.shapes import Model
from megatron_moellava.stages import TARGETS
from megatron_moellava.towers import get_tower

EVERYWHERE = LoraConfig(rank=3, targets=tuple(TARGETS))


def model(backbone: str, moe: MoEConfig | None = None) -> Model:
    return Model(backbone=get_backbone(backbone), tower=get_tower("clip-tiny"), moe=moe)


@pytest.mark.parametrize(
    ("whole", "layout"),
    [
        (model("llama-tiny"), OWN),
        (model("phi-2-tiny", MoEConfig(use_residual=True)), OWN),
        (model("phi-2-tiny", MoEConfig()), ORIGINAL),
        (model("llama-tiny", MoEConfig()), ORIGINAL),
    ],
    ids=["dense", "residual", "original, biased", "original, gated"],
)
def test_ranges_cover_every_tensor_once(whole, layout):
    ranges = defaultdict(list)
    found = lines(whole, EVERYWHERE, layout)
    for line in found:
        ranges[line.part.source].append((line.part.start, line.part.start + line.part.count))
    wanted = {name: tensor.size for name, tensor in adapter_tensors(whole, EVERYWHERE).items()}
    assert ranges.keys() == wanted.keys()
    for name, parts in ranges.items():
        edges = [edge for part in sorted(parts) for edge in part]
        assert edges[0] == 0 and edges[-1] == wanted[name] and edges[1:-1:2] == edges[2::2], name
    assert len({line.name for line in found}) == len(found)


def test_names_are_those_of_the_layout():
    language = replace(model("llama-tiny"), tower=None)
    names = {line.name for line in lines(language, LoraConfig(), LANGUAGE_MODEL)}
    assert "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight" in names
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight" in names
    latent = replace(model("deepseek-v3-tiny"), tower=None, moe=get_backbone("deepseek-v3-tiny").moe)
    attention = {line.name for line in lines(latent, LoraConfig(targets=("attention",)), LANGUAGE_MODEL)}
    projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    layer = "base_model.model.model.layers.1.self_attn."
    assert {name for name in attention if name.startswith(layer)} == {
        f"{layer}{projection}.lora_{letter}.weight" for projection in projections for letter in "AB"
    }
    experts = {line.name for line in lines(model("phi-2-tiny", MoEConfig()), LoraConfig(), OWN)}
    assert "base_model.model.model.language_model.layers.0.mlp.experts.3.fc2.lora_B.weight" in experts


def test_experts_in_one_tensor_are_no_lines_and_have_names_of_their_own():
    whole = model("llama-tiny", MoEConfig(placement=(1,)))
    lora = LoraConfig(targets=("experts",))
    assert lines(whole, lora, OWN) == [] and not fused_matrices(model("phi-2-tiny", MoEConfig()), lora)
    names = [name for adapted, spelled in fused_matrices(whole, lora) for name in fused_names(adapted, spelled)]
    root = "base_model.model.model.language_model.layers.1.mlp.experts"
    assert names == [f"{root}{part}.lora_{letter}.weight" for part in (".base_layer", "") for letter in "AB"]
