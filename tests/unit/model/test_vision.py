"""Tower and projector of tiny models; tests/parity compares them with transformers."""

import pytest
import torch

from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.model.build import build_model
from megatron_moellava.towers import TOWERS


def model_of(tower: str):
    tree = {"model": {"backbone": "llama-tiny", "tower": tower}, "training": {"stage": 2, "precision": "bf16"}}
    set_override(tree, "training.precision", "fp32")
    return build_model(from_dict(RunConfig, tree))[0].eval()


@torch.no_grad()
@pytest.mark.parametrize("tower", [name for name in TOWERS if "tiny" in name])
def test_an_image_becomes_as_many_tokens_as_the_tower_promises(world, tower):
    model = model_of(tower)
    size = model.tower.image_size
    pixels_NCHW = torch.randn(2, 3, size, size)
    features_NVD = model.vision_tower(pixels_NCHW)
    assert features_NVD.shape == (2, model.tower.num_features, model.tower.hidden_size)
    assert model.projector(features_NVD).shape == (2, model.tower.num_features, model.backbone.hidden_size)
    assert torch.allclose(features_NVD[:1], model.vision_tower(pixels_NCHW[:1]), atol=1e-5), "images do not meet"


@torch.no_grad()
def test_rows_are_class_token_then_patches_each_with_its_position(world):
    model = model_of("clip-tiny")
    tower, vision = model.tower, model.vision_tower
    vision.ln_pre = torch.nn.Identity()
    vision.position_embeddings.weight.zero_()
    rows_NRD = vision.embed(torch.zeros(1, 3, tower.image_size, tower.image_size))
    assert rows_NRD.shape[1] == tower.num_positions == (tower.image_size // tower.patch_size) ** 2 + 1
    assert torch.equal(rows_NRD[0, 0], vision.class_token[0, 0])
    assert not rows_NRD[0, 1:].any(), "a black picture's patches are zero without a bias"


@torch.no_grad()
def test_the_projector_is_linear_gelu_linear(world):
    projector = model_of("clip-tiny").projector
    features_NVD = torch.randn(1, 3, projector.linear_fc1.weight.shape[1])
    inner = torch.nn.functional.linear(features_NVD, projector.linear_fc1.weight, projector.linear_fc1.bias)
    expected = torch.nn.functional.linear(
        torch.nn.functional.gelu(inner), projector.linear_fc2.weight, projector.linear_fc2.bias
    )
    assert torch.allclose(projector(features_NVD), expected, atol=1e-5)
