"""A modality gets a tower and a projector of its own: published weights, copies, new ones, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.inspection import inspect
from megatron_moellava.conversion.megatron_checkpoint import check_complete, open_checkpoint
from megatron_moellava.conversion.modality import add_modality
from megatron_moellava.conversion.tensors import loaded
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.costs.shapes import UNUSED
from megatron_moellava.towers import get_tower
from megatron_moellava.towers.branches import Branch
from tests.helpers.conversion_models import TOWER
from tests.helpers.paths import GOLDEN

SIGLIP = GOLDEN / "assets/google/siglip-tiny"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(folder)
    check_complete(source)
    return {name: loaded(tensor).reshape(tensor.shape) for name, tensor in source.tensors.items()}


def below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_copies_are_bit_identical_and_all_else_stays(imported, tmp_path):
    before = tensors_of(imported)
    add_modality(imported, save=tmp_path / "run", modality="depth", copy_tower=True, projector="copy")
    after = tensors_of(tmp_path / "run")
    tower = {name: value for name, value in below(before, "vision_tower.").items() if not name.startswith("unused.")}
    assert same(below(after, "modality_depth.tower."), tower) and tower
    assert same(below(after, "modality_depth.projector."), below(before, "projector."))
    assert same({name: value for name, value in after.items() if not name.startswith("modality_")}, before)
    assert any(name.startswith(UNUSED) for name in after), "an export of the model's own tower stays complete"


def test_a_published_tower_of_another_family_and_size_comes_whole_with_a_new_projector(imported, tmp_path):
    report = add_modality(imported, save=tmp_path / "run", modality="thermal", tower=str(SIGLIP), seed=3)
    tower = get_tower(str(SIGLIP))
    assert report["branch"] == Branch(modality="thermal", tower=tower, own_projector=True)
    after, published = tensors_of(tmp_path / "run"), load_file(SIGLIP / "model.safetensors")
    conv = published["vision_model.embeddings.patch_embedding.weight"]
    assert torch.equal(after["modality_thermal.tower.conv1.weight"], conv.bfloat16()), (
        "in the type of the model's tower"
    )
    query = published["vision_model.encoder.layers.0.self_attn.q_proj.weight"].bfloat16()
    fused = after["modality_thermal.tower.decoder.layers.0.self_attention.linear_qkv.weight"]
    heads, width = tower.num_attention_heads, tower.hidden_size
    assert torch.equal(fused.view(heads, 3, -1, width)[:, 0].reshape(width, width), query)
    fc1 = after["modality_thermal.projector.linear_fc1.weight"]
    bound = tower.projector_input_size**-0.5
    assert fc1.shape[1] == tower.projector_input_size and 0.9 * bound < fc1.abs().max() <= bound * 1.01


def test_upcycling_and_a_second_modality_keep_what_is_there(imported, tmp_path):
    add_modality(imported, save=tmp_path / "one", modality="depth", projector="new")
    add_modality(tmp_path / "one", save=tmp_path / "two", modality="thermal", tower=str(TOWER), projector="shared")
    upcycle_checkpoint(tmp_path / "two", save=tmp_path / "moe", moe=MoEConfig())
    depth = below(tensors_of(tmp_path / "one"), "modality_depth.")
    after = tensors_of(tmp_path / "moe")
    assert same(below(after, "modality_depth."), depth) and all(name.startswith("projector.") for name in depth)
    assert below(after, "modality_thermal.tower.") and not below(after, "modality_thermal.projector.")
    text = inspect(tmp_path / "moe")
    assert f"depth        {TOWER} (shared), 16 visual tokens, own projector" in text
    assert f"thermal      {TOWER}, 16 visual tokens, shared projector" in text


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"projector": "shared"}, "depth would have nothing of its own"),
        ({"modality": "De pth"}, "must be lower-case letters"),
        ({"tower": "clip-tiny"}, "a name has no weights"),
        ({"tower": str(TOWER), "copy_tower": True}, "two starts of one tower"),
        ({"tower": "siglip2-base-patch16-naflex"}, "gives pictures different numbers of visual tokens"),
        (
            {"tower": f"{SIGLIP}@pixel_shuffle", "projector": "copy"},
            "are 192 wide, and those of .* 48; use --projector new",
        ),
        (
            {"tower": f"{SIGLIP}@pixel_shuffle", "projector": "shared"},
            "are 192 wide, and those of .* 48; use --projector new",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(imported, tmp_path, asked, said):
    with pytest.raises(ConfigError, match=said):
        add_modality(imported, save=tmp_path / "run", **{"modality": "depth"} | asked)
    assert not (tmp_path / "run").exists()


def test_layouts_that_have_one_tower_refuse_and_parts_are_exported(imported, tmp_path):
    add_modality(imported, save=tmp_path / "run", modality="depth", copy_tower=True)
    with pytest.raises(ConfigError, match="has something of its own for depth already"):
        add_modality(tmp_path / "run", save=tmp_path / "again", modality="depth")
    for layout in ("original", "llava", "transformers", "gguf"):
        with pytest.raises(
            ConfigError, match=f"--layout {layout} has one tower and one projector, and this model .* depth"
        ):
            export_checkpoint(tmp_path / "run", save=tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()
    for layout in ("language-model", "tower", "projector"):
        export_checkpoint(tmp_path / "run", save=tmp_path / layout, layout=layout)
