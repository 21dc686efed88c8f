"""What is read of a folder, and what of it is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.checkpoint.description import read_description, trained_with
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.towers import get_tower
from tests.helpers.conversion_models import (
    TOWER,
    TOWER_PREFIX,
    assert_same_bytes,
    original_config,
    original_state,
    write_folder,
)
from tests.helpers.hf_models import BUILDERS
from tests.helpers.paths import GOLDEN


def test_released_moe_settings_are_read(tmp_path):
    source = write_folder(tmp_path / "source", original_state("phi", "moe"), original_config("phi", "moe"))
    moe = import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))["model"].moe
    assert (moe.num_moe_experts, moe.moe_router_topk, moe.placement, moe.router) == (4, 2, (0, 2), "original")
    assert (moe.moe_expert_capacity_factor, moe.eval_capacity_factor, moe.min_capacity) == (1.5, 2.0, 0)


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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_projector_type": "qformer2_4"}, "qformer2_4"),
        ({"mm_vision_select_layer": [-2, -3]}, r"are of layer \[-2, -3\] .* one of -\d to \d is supported"),
        ({"mm_vision_select_layer": 99}, "are of layer 99"),
        ({"mm_vision_select_layer": -99}, "are of layer -99"),
        ({"mm_vision_select_layer": "-2"}, "are of layer -2"),
    ],
)
def test_multimodal_settings_that_are_not_supported_are_named(tmp_path, setting, message):
    config = original_config("llama", "dense") | setting
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    with pytest.raises(ConfigError, match=message):
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))


@pytest.mark.parametrize("given, by_the_original, drops", [
    ("siglip@original", False, True), ("siglip", False, False), ("siglip", True, True), ("clip", True, True),
])  # fmt: skip
def test_the_rule_of_the_towers_features_is_given_or_told_from_the_projector(tmp_path, given, by_the_original, drops):
    """`FOLDER@original` is a folder with a rule; the original's mm_projector.bin was trained without SigLIP's first patch."""
    BUILDERS["llama"](tmp_path / "hf")
    towers = {"siglip": GOLDEN / "assets/google/siglip-tiny", "clip": TOWER}
    name, _, rule = given.partition("@")
    tower = f"{towers[name]}{'@' if rule else ''}{rule}"
    width = get_tower(str(towers[name])).hidden_size
    prefix = "model.mm_projector.image_spatial_proj." if by_the_original else "model.mm_projector."
    shapes = {"0.weight": (64, width), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({prefix + key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "mm_projector.bin")
    report = import_checkpoint(
        tmp_path / "hf", save=tmp_path / "run", tower=tower, projector=tmp_path / "mm_projector.bin"
    )
    assert report["model"].tower.drop_first_feature is drops
    export_checkpoint(tmp_path / "run", save=tmp_path / "projector", layout="projector")
    again = import_checkpoint(
        tmp_path / "hf",
        save=tmp_path / "again",
        tower=str(towers[name]),
        projector=tmp_path / "projector/mm_projector.bin",
    )
    assert again["model"].tower.drop_first_feature is drops  # the config.json beside the projector says so


def test_what_a_release_says_of_its_training_is_recorded(tmp_path):
    config = original_config("llama", "dense") | {"image_aspect_ratio": "square", "tokenizer_model_max_length": 3072}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    trained = trained_with(read_description(require_checkpoint(tmp_path / "run")))
    assert trained["data"] == {
        "template": "v1",
        "label_mode": "original",
        "image_aspect_ratio": "square",
        "max_sample_length": 3072,
        "length_counts": "text",
    }
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config


ODD = {  # config.json of a release -> what the message must say
    "a size in quotes": (
        "dense",
        {"num_attention_heads": "4"},
        "num_attention_heads='4': must be a whole number above 0",
    ),
    "no heads": ("dense", {"num_attention_heads": 0}, "num_attention_heads=0"),
    "an epsilon in quotes": ("dense", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5': must be a number"),
    "a list for a name": ("dense", {"model_type": ["llama"]}, r"model_type=\['llama'\] .* must be a name"),
    "an empty MoE": ("moe", {"moe": {"moe_enable": True}}, "config.moe lacks num_experts, top_k_experts"),
    "a MoE without layers": (
        "moe",
        {"moe": {"moe_enable": True, "num_experts": [4], "top_k_experts": 2, "router_aux_loss_coef": 0.01}},
        "config.moe lacks moe_layers_idx",
    ),
    "no training": ("dense", {"trained_with": "v1"}, "trained_with='v1' must be an object"),
    "a training that nobody knows": ("dense", {"trained_with": {"data": {"colour": 1}}}, r"holds data\.colour"),
}


@pytest.mark.parametrize("what", ODD)
def test_a_config_that_nobody_can_have_meant_is_one_message(tmp_path, what):
    kind, change, message = ODD[what]
    config = original_config("llama", kind) | change
    source = write_folder(tmp_path / "source", original_state("llama", kind), config)
    with pytest.raises(ConfigError, match=message):
        import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))


def test_links_of_a_download_whose_files_are_gone_are_named(tmp_path):
    """A hub cache links to blobs; `cp -r` copies the links alone."""
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    blob = (source / "model.safetensors").rename(tmp_path / "blob")
    (source / "model.safetensors").symlink_to(blob)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    blob.unlink()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors there are links to files that are gone: copy with `cp -L`"
    ):
        import_checkpoint(source, save=tmp_path / "again", tower=str(TOWER))
