"""Attention across the frames of a video."""

import pytest
import torch

from megatron_moellava.model.temporal import TemporalLayer
from tests.unit.model.test_vision import model_of

TINY = "languagebind-video-tiny"


@pytest.fixture
def vision(world):
    return model_of(TINY).vision_tower


@torch.no_grad()
def test_without_what_is_learned_of_time_frames_are_pictures(vision):
    """No embedding and no output of the attention across frames: each frame goes its way alone."""
    layers = vision.decoder.layers
    assert len(layers) == 2 and all(isinstance(layer, TemporalLayer) for layer in layers)
    for layer in layers:
        layer.temporal_embedding.zero_()
        layer.temporal_attention.linear_proj.weight.zero_()
        layer.temporal_attention.linear_proj.bias.zero_()
    video = torch.randn(4, *vision.tower.pixel_shape)
    still = vision(video[:1].expand(4, -1, -1, -1))
    assert torch.allclose(vision(video)[0], still[0], atol=1e-5)


@torch.no_grad()
def test_a_row_attends_to_its_own_place_in_the_other_frames(vision):
    (layer, *_), rows = vision.decoder.layers, vision.tower.num_rows
    layer.temporal_embedding.normal_()
    hidden_RNH = torch.randn(rows, 8, vision.tower.hidden_size)  # two videos
    before = layer._across_frames(hidden_RNH)
    hidden_RNH[2, 1] = torch.randn(vision.tower.hidden_size)
    differs = (layer._across_frames(hidden_RNH) - before).abs().amax(dim=2) > 1e-4
    assert differs.nonzero().tolist() == [[2, 0], [2, 1], [2, 2], [2, 3]]


@torch.no_grad()
def test_frames_in_another_order_are_another_video(vision):
    video = torch.randn(4, *vision.tower.pixel_shape)
    for layer in vision.decoder.layers:
        layer.temporal_embedding.normal_()
    assert not torch.allclose(vision(video.flip(0)).flip(0), vision(video), atol=1e-2)
