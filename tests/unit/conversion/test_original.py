"""The released layouts, in and out, byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
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


def test_released_moe_settings_are_read(tmp_path):
    source = write_folder(tmp_path / "source", original_state("phi", "moe"), original_config("phi", "moe"))
    moe = import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))["model"].moe
    assert (moe.num_moe_experts, moe.moe_router_topk, moe.placement, moe.router) == (4, 2, (0, 2), "original")
    assert (moe.moe_expert_capacity_factor, moe.eval_capacity_factor, moe.min_capacity) == (1.5, 2.0, 0)


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


def test_new_projector_is_drawn_by_seed_alone(tmp_path):
    state = original_state("llama", "dense")
    language = {
        name: value for name, value in state.items() if "mm_projector" not in name and "image_tower" not in name
    }
    config = original_config("llama", "dense") | {"model_type": "llama"}
    source = write_folder(tmp_path / "language", language, {k: v for k, v in config.items() if not k.startswith("mm_")})

    def projector(name: str, seed: int) -> dict[str, torch.Tensor]:
        import_checkpoint(source, save=tmp_path / name, tower=str(TOWER), seed=seed)
        export_checkpoint(tmp_path / name, save=tmp_path / f"{name}_out", layout="projector")
        return torch.load(tmp_path / f"{name}_out/mm_projector.bin", weights_only=True)

    first, again, other = projector("a", 1), projector("b", 1), projector("c", 2)
    weight = "model.mm_projector.image_spatial_proj.0.weight"
    assert_same_bytes(first, again)
    assert not torch.equal(first[weight], other[weight])
    bound = get_tower(str(TOWER)).hidden_size ** -0.5  # torch's default for a Linear layer
    assert 0.9 * bound < first[weight].float().abs().max() <= bound * 1.01
    assert first[weight].dtype == torch.bfloat16 and first["model.mm_projector.image_spatial_proj.0.bias"].any()


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


def test_tower_missing_in_a_release_is_taken_from_its_folder(tmp_path):
    state = original_state("llama", "dense")
    alone = {name: value for name, value in state.items() if not name.startswith(TOWER_PREFIX)}
    source = write_folder(tmp_path / "source", alone, original_config("llama", "dense"))
    with pytest.raises(ConfigError, match="give --tower"):
        import_checkpoint(source, save=tmp_path / "run")
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="tower")
    assert_same_bytes(load_file(tmp_path / "out/model.safetensors"), load_file(TOWER / "model.safetensors"))


def test_a_clip_file_with_both_towers_gives_its_vision_half(tmp_path):
    vision = load_file(TOWER / "model.safetensors")
    both = vision | {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(1)}
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file(both, folder / "model.safetensors")
    inner = json.loads((TOWER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": inner}))
    state = {name: value for name, value in original_state("llama", "dense").items() if "image_tower" not in name}
    source = write_folder(tmp_path / "source", state, original_config("llama", "dense"))
    report = import_checkpoint(source, save=tmp_path / "run", tower=str(folder))
    assert report["dropped"]["not part of the vision tower"]


def test_original_siglip_drops_its_first_feature(tmp_path):
    """Released SigLIP models were trained on 728 of 729 patches; that must not change on import."""
    siglip = GOLDEN / "assets/google/siglip-tiny"
    state = {name: value for name, value in original_state("llama", "dense").items() if "image_tower" not in name}
    source = write_folder(tmp_path / "source", state, original_config("llama", "dense"))
    tower = import_checkpoint(source, save=tmp_path / "run", tower=str(siglip))["model"].tower
    assert (tower.num_features, get_tower(str(siglip)).num_features) == (15, 16)
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="tower")
    assert_same_bytes(load_file(tmp_path / "out/model.safetensors"), load_file(siglip / "model.safetensors"))


def test_dtype_converts_every_tensor_and_back(tmp_path):
    state = original_state("llama", "moe")
    source = write_folder(tmp_path / "source", state, original_config("llama", "moe"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER), dtype="float32")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "run").tensors.values() if tensor.tiles} == {
        "float32"
    }
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original", dtype="bfloat16")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(exported[name], value.bfloat16()) for name, value in state.items())


def test_multimodal_settings_that_are_not_supported_are_named(tmp_path):
    config = original_config("llama", "dense") | {"image_projector_type": "qformer2_4"}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    with pytest.raises(ConfigError, match="qformer2_4"):
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))


def test_export_without_the_towers_last_layer_says_how_to_get_it(tmp_path):
    """A run that did not carry the unused tensors along can still be exported, from the published tower."""
    state = {
        name: value
        for name, value in original_state("llama", "dense").items()
        if ".layers.2." not in name or "image_tower" not in name
    }
    state = {name: value for name, value in state.items() if "post_layernorm" not in name}
    source = write_folder(tmp_path / "source", state, original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    with pytest.raises(CheckpointError, match="--tower"):
        export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original")
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original", tower=TOWER)
    assert len(load_file(tmp_path / "out/model.safetensors")) == len(original_state("llama", "dense"))
