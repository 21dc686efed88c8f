"""What an export says of how its model wants to be asked."""

from dataclasses import replace

from megatron_moellava.backbones import get_backbone
from megatron_moellava.conversion.asked_as import asked_as
from megatron_moellava.costs.shapes import Model
from megatron_moellava.towers import get_tower

MODEL = Model(backbone=get_backbone("llama-tiny"), tower=get_tower("clip-tiny"))


def test_only_what_an_import_would_not_know_is_said():
    trained = {"data": {"template": "v1", "video_frames": 8, "max_images": 2, "seq_length": 64}}
    assert asked_as(MODEL, trained, {}) == {"template": "v1", "max_images": 2}
    assert asked_as(MODEL, trained, {"data": {"template": "v1", "max_images": 1}}) == {"max_images": 2}


def test_a_run_without_a_template_of_its_own_had_the_backbones():
    assert asked_as(MODEL, {"data": {"template": ""}}, {}) == {"template": MODEL.backbone.template}
    assert asked_as(MODEL, {"model": {"scale_multimodal_embeddings": True}}, {}) == {}


def test_a_language_model_alone_keeps_what_is_not_of_pictures():
    trained = {"data": {"template": "v1", "box_format": "qwen", "max_images": 2}}
    assert asked_as(replace(MODEL, tower=None), trained, {}) == {"template": "v1", "box_format": "qwen"}
