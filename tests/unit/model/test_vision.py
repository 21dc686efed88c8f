"""Tower and projector of tiny models; tests/parity compares them with transformers."""

import pytest
import torch

from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.model.build import build_model
from megatron_moellava.model.vision import lines_of, merged
from megatron_moellava.towers import TOWERS, get_tower


def model_of(tower: str):
    tree = {"model": {"backbone": "llama-tiny", "tower": tower}, "training": {"stage": 2, "precision": "bf16"}}
    set_override(tree, "training.precision", "fp32")
    return build_model(from_dict(RunConfig, tree))[0].eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "tower", [name for name in TOWERS if "tiny" in name and not (TOWERS[name].native or TOWERS[name].takes_videos)]
)
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


@torch.no_grad()
@pytest.mark.parametrize("tower", ["naflex-tiny", "naflex-tiny@pixel_shuffle", "siglip-tiny@pixel_shuffle"])
def test_projected_tokens_are_as_many_as_the_pictures_have(world, tower):
    model = model_of(tower)
    grids = ((2, 4), (4, 4), (2, 2)) if model.tower.native else ()
    count = sum(rows * columns for rows, columns in grids) if grids else 2
    features = model.encode_images(torch.randn(count, *model.tower.pixel_shape), grids)
    tokens = count // model.tower.shuffle**2 if grids else 2 * model.tower.num_features
    assert features.flatten(0, -2).shape == (tokens, model.backbone.hidden_size)


def test_a_pixel_shuffle_joins_neighbours():
    """Features 0 .. 7 of 2 x 4 patches, and a square of them."""
    native, square = get_tower("naflex-tiny@pixel_shuffle"), get_tower("siglip-tiny@pixel_shuffle")
    assert merged(torch.arange(8.0)[:, None], ((2, 4),), native).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert merged(torch.arange(16.0).view(1, 16, 1), (), square)[0].tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]
    ]  # fmt: skip


def test_lines_of_tiles_are_the_picture_without_its_padding():
    """Two tiles beside each other of 2 x 2 features, of which the upper and lower line only pad."""
    names = torch.arange(12.0).view(3, 4, 1)  # overview 0 .. 3, left 4 .. 7, right 8 .. 11
    end = torch.tensor([-1.0])
    whole = lines_of(names, ((1, 2, 2, 4),), end).flatten().tolist()
    assert whole == [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]
    four = torch.arange(20.0).view(5, 4, 1)
    kept = lines_of(four, ((2, 2, 2, 4),), end).flatten().tolist()
    assert kept == [0, 1, 2, 3, 6, 7, 10, 11, -1, 12, 13, 16, 17, -1]
    alone = lines_of(names, ((0, 0, 0, 0),) * 3, end).flatten().tolist()
    assert alone == [0, 1, 2, 3, -1, 4, 5, 6, 7, -1, 8, 9, 10, 11, -1]
