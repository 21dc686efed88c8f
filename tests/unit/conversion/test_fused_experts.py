"""The order of ranks in an adapter of all experts in one tensor. tests/parity/test_lora.py loads one into `peft`."""

import pytest
import torch

from megatron_moellava.config import CheckpointError, LoraConfig
from megatron_moellava.conversion.fused_experts import exported, imported
from megatron_moellava.costs.adapters import Adapted
from tests.helpers.conversion_models import read
from tests.unit.conversion.test_merge import made

LORA = LoraConfig(rank=2)
ITEM = Adapted(
    name="layer.mlp.experts.experts.linear_fc1",
    role="experts",
    parts=(("gate", 3), ("up", 3)),
    columns=5,
    split=0,
    experts=2,
)
NAMES = tuple(f"layer.mlp.experts.{k}.{part}_proj.weight" for k in range(2) for part in ("gate", "up"))


def tensors() -> dict[str, torch.Tensor]:
    shapes = {f"adapters.{ITEM.name}.{key}": tensor.shape for key, tensor in ITEM.tensors(LORA).items()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_products_are_those_of_every_projection_and_come_back():
    ours = tensors()
    made_of = {name: made(value) for name, value in ours.items()}
    theirs = dict(exported(ITEM, LORA, NAMES, made_of))
    root = "layer.mlp.experts.base_layer.lora_"
    a, b = (read(theirs[f"{root}{letter}.weight"]) for letter in "AB")
    product = torch.einsum("o r e, e r i -> e o i", b.view(6, 4, 2), a.view(2, 4, 5))  # as peft computes it
    for expert in range(2):
        gate, up = ours[f"adapters.{ITEM.name}.a"][expert].chunk(2)
        wanted = [ours[f"adapters.{ITEM.name}.b_{part}"][expert] @ own for part, own in (("gate", gate), ("up", up))]
        assert torch.allclose(product[expert], torch.cat(wanted), atol=1e-6)
    back = {name: read(tensor) for name, tensor in imported(ITEM, LORA, NAMES, theirs, "")}
    assert back.keys() == ours.keys() and all(torch.equal(value, back[name]) for name, value in ours.items())


def test_an_adapter_that_mixes_gate_and_up_is_refused():
    theirs = {"layer.mlp.experts.base_layer.lora_A.weight": made(torch.ones(8, 5))}
    theirs["layer.mlp.experts.base_layer.lora_B.weight"] = made(torch.ones(6, 8))
    with pytest.raises(CheckpointError, match="mixes the ranks of gate and up"):
        list(imported(ITEM, LORA, NAMES, theirs, ""))


def test_a_layer_without_an_adapter_has_zeros():
    back = dict(imported(ITEM, LORA, NAMES, {"other": made(torch.ones(1))}, ""))
    assert len(back) == 3 and not any(read(tensor).any() for tensor in back.values())
