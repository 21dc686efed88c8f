"""Which matrices get adapters, and of which shapes."""

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import LoraConfig, MoEConfig
from megatron_moellava.costs.adapters import adapted_matrices, adapter_tensors, targets_without_a_matrix
from megatron_moellava.costs.shapes import Model, megatron_tensors
from megatron_moellava.stages import TARGETS
from megatron_moellava.towers import get_tower

EVERYWHERE = LoraConfig(rank=2, targets=tuple(TARGETS))


def model(backbone: str = "llama-tiny", moe: MoEConfig | None = None) -> Model:
    return Model(backbone=get_backbone(backbone), tower=get_tower("clip-tiny"), moe=moe)


@pytest.mark.parametrize("backbone", ["llama-tiny", "phi-2-tiny"])
@pytest.mark.parametrize("moe", [None, MoEConfig(use_residual=True)], ids=["dense", "residual"])
def test_projections_and_columns_make_up_the_whole_matrix(backbone, moe):
    whole = model(backbone, moe)
    shapes = megatron_tensors(whole)
    found = adapted_matrices(whole, EVERYWHERE)
    assert {item.role for item in found} == {
        role for role in TARGETS.values() if moe or role not in ("experts", "router")
    }
    for item in found:
        shape = shapes[f"{item.name}.weight"]
        assert shape[-2:] == (sum(rows for _, rows in item.parts), item.columns)
        assert shape[:-2] == ((item.experts,) if item.experts else ())
        tensors = item.tensors(EVERYWHERE)
        assert tensors["a"].shape[-2:] == (2 * len(item.parts), item.columns)
        assert [tensor.shape[-2] for key, tensor in tensors.items() if key != "a"] == [rows for _, rows in item.parts]
    names = {part for item in found for part, _ in item.parts}
    assert names == {"q", "k", "v", ""} | ({"gate", "up"} if whole.backbone.gated_linear_unit else set())


def test_every_projection_around_the_latents_is_a_matrix_of_attention():
    backbone = get_backbone("deepseek-v3-tiny")
    found = adapted_matrices(model("deepseek-v3-tiny", backbone.moe), LoraConfig(targets=("attention",)))
    names = {item.name.rpartition(".")[2]: item for item in found if ".layers.1." in item.name}
    latents = {f"linear_{name}_proj" for name in ("q_down", "q_up", "kv_down", "kv_up")}
    assert names.keys() == latents | {"linear_proj"} and all(names[name].split == 0 for name in latents)
    assert all(item.parts == (("", item.parts[0][1]),) for item in found)


def test_the_usual_targets_are_the_language_models_own_as_far_as_it_has_them():
    dense, sparse = (
        {item.role for item in adapted_matrices(model(moe=moe), LoraConfig())} for moe in (None, MoEConfig())
    )
    assert dense == {"language.attention", "language.ffn"}
    assert sparse == dense | {"experts"}


def test_a_tensor_that_all_experts_share_faces_the_hidden_states():
    whole = model(moe=MoEConfig(num_moe_experts=4))
    hidden, inner = whole.backbone.hidden_size, whole.backbone.ffn_hidden_size
    lora = LoraConfig(rank=2, targets=("experts",), shared_outer=True)
    prefix = "adapters.language_model.decoder.layers.0.mlp.experts.experts."
    shapes = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in adapter_tensors(whole, lora).items()
        if name.startswith(prefix)
    }
    assert shapes == {
        "linear_fc1.a": (4, hidden),
        "linear_fc1.b_gate": (4, inner, 2),
        "linear_fc1.b_up": (4, inner, 2),
        "linear_fc2.a": (4, 2, inner),
        "linear_fc2.b": (hidden, 2),
    }


def test_targets_that_match_nothing_are_named():
    assert targets_without_a_matrix(model(), EVERYWHERE) == ["experts", "router"]
    everywhere = MoEConfig(placement="dense")
    assert targets_without_a_matrix(model(moe=everywhere), EVERYWHERE) == ["ffn"]
    assert targets_without_a_matrix(model(), LoraConfig()) == []
