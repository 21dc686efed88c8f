"""New weights: torch's default for a linear layer, from the seed and the name alone."""

import math

import pytest
import torch

from megatron_moellava.backbones import get_backbone
from megatron_moellava.conversion.initial import language_dtype, linear_default, new_projector, noise, zeros
from megatron_moellava.conversion.tensors import Tensor
from megatron_moellava.costs.shapes import LANGUAGE, Model
from megatron_moellava.towers import get_tower
from tests.helpers.conversion_models import read


def test_values_are_uniform_in_torchs_bounds():
    values = read(linear_default("a", (64, 100), 100, "float32", seed=1))
    assert values.abs().max() <= 0.1 and values.std() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    smaller = read(linear_default("a", (64, 100), 100, "float32", seed=1, scale=0.5))
    assert torch.allclose(smaller, values / 2)


def test_each_name_and_seed_has_its_own_numbers_and_they_repeat():
    def draw(name, seed):
        return read(linear_default(name, (8, 4), 4, "float32", seed))

    assert torch.equal(draw("a", 1), draw("a", 1))
    assert not torch.equal(draw("a", 1), draw("b", 1)) and not torch.equal(draw("a", 1), draw("a", 2))


def test_a_projector_has_the_language_models_dtype_and_both_widths():
    model = Model(backbone=get_backbone("llama-tiny"), tower=get_tower("clip-tiny"))
    made = new_projector(model, {"model.norm.weight": Tensor((4,), "bfloat16")}, seed=1)
    assert {tensor.dtype for tensor in made.values()} == {"bfloat16"}
    hidden, width = model.backbone.hidden_size, model.tower.hidden_size
    assert [tensor.shape for name, tensor in sorted(made.items())] == [
        (hidden,), (hidden, width), (hidden,), (hidden, hidden),
    ]  # fmt: skip


def test_noise_is_a_share_of_the_blocks_own_spread():
    block = torch.randn(2000, dtype=torch.float32) * 5
    moved = noise("a", 0.1, seed=1)(block) - block
    assert moved.std() == pytest.approx(0.5, rel=0.1)
    assert torch.equal(noise("a", 0.1, seed=1)(block) - block, moved)
    assert not noise("a", 0.1, seed=1)(torch.ones(10)).sub(1).any(), "no spread, no noise"


def test_zeros_and_the_language_models_dtype():
    assert not read(zeros((2, 3), "float32")).any()
    assert language_dtype({f"{LANGUAGE}embedding.word_embeddings.weight": Tensor((2, 2), "bfloat16")}) == "bfloat16"
