"""The released layouts, in and out, byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.towers import get_tower
from tests.helpers.conversion_models import (
    GOLDEN,
    TOWER,
    TOWER_PREFIX,
    assert_same_bytes,
    original_config,
    original_state,
    residual,
    write_folder,
)


def round_trip(source, tmp_path):
    report = import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original")
    return report, load_file(tmp_path / "out/model.safetensors"), json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("storage", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize(("backbone", "kind"), [("phi", "dense"), ("phi", "moe"), ("llama", "dense"), ("llama", "moe")])
def test_import_then_export_is_byte_equal(tmp_path, backbone, kind, storage):
    """bf16 weights with fp32 gates, as released: neither is converted."""
    state, config = original_state(backbone, kind), original_config(backbone, kind)
    report, exported, written = round_trip(write_folder(tmp_path / "source", state, config, storage), tmp_path)
    assert_same_bytes(exported, state)
    assert written == config
    assert report["stage"] == (3 if kind == "moe" else 2)


def test_residual_moe_is_byte_equal(tmp_path):
    state, config = residual(original_state("phi", "moe")), original_config("phi", "moe_residual")
    report, exported, written = round_trip(write_folder(tmp_path / "source", state, config), tmp_path)
    assert_same_bytes(exported, state)
    assert written == config and report["model"].moe.use_residual


@pytest.mark.parametrize("backbone", ["phi", "llama"])
def test_stage_1_projector_comes_in_and_goes_out(tmp_path, backbone):
    """A language model, a tower and the original's own mm_projector.bin are what its stage 1 leaves."""
    state = {name: value for name, value in original_state(backbone, "dense").items() if "mm_projector" not in name}
    language = {name: value.float() for name, value in state.items() if not name.startswith(TOWER_PREFIX)}
    config = {key: value for key, value in original_config(backbone, "dense").items() if not key.startswith("mm_")}
    config["model_type"] = backbone
    report = import_checkpoint(
        write_folder(tmp_path / "language", language, config),
        save=tmp_path / "run",
        tower=str(TOWER),
        projector=GOLDEN / backbone / "mm_projector.bin",
    )
    assert report["stage"] == 1
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="projector")
    exported = torch.load(tmp_path / "out/mm_projector.bin", weights_only=True)
    assert_same_bytes(exported, torch.load(GOLDEN / backbone / "mm_projector.bin", weights_only=True))


def test_llava_1_5_layout_is_byte_equal_and_its_buffers_are_reported(tmp_path):
    renamed = {
        name.replace("image_tower.image_tower", "vision_tower.vision_tower").replace("image_spatial_proj.", ""): value
        for name, value in original_state("llama", "dense").items()
    }
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    config = original_config("llama", "dense") | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    config = {k: v for k, v in config.items() if k not in ("mm_image_tower", "image_projector_type", "mm_video_tower")}
    source = write_folder(tmp_path / "source", renamed | buffers, config | {"mm_projector_type": "mlp2x_gelu"})
    report = import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    assert report["layout"] == "llava" and sum(map(len, report["dropped"].values())) == 4
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="llava")
    assert_same_bytes(load_file(tmp_path / "out/model.safetensors"), renamed)


def test_original_siglip_drops_its_first_feature(tmp_path):
    """Released SigLIP models were trained on 728 of 729 patches; that must not change on import."""
    siglip = GOLDEN / "assets/google/siglip-tiny"
    state = {name: value for name, value in original_state("llama", "dense").items() if "image_tower" not in name}
    source = write_folder(tmp_path / "source", state, original_config("llama", "dense"))
    tower = import_checkpoint(source, save=tmp_path / "run", tower=str(siglip))["model"].tower
    assert (tower.num_features, get_tower(str(siglip)).num_features) == (15, 16)
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="tower")
    assert_same_bytes(load_file(tmp_path / "out/model.safetensors"), load_file(siglip / "model.safetensors"))
