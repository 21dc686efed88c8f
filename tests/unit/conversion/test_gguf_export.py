"""GGUF files hold the checkpoint's numbers under llama.cpp's names. (tests/llama_cpp runs them.)"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file

from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.sums import verify_sums
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.gguf_export import check_gguf, gguf_notes
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.towers import get_tower
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder
from tests.helpers.tokenizer_folders import llama_folder

LAYERS = "model.layers."
F16 = 2**-11  # rounding of a number
Q8_0 = 1 / 254 + F16  # half of 127 steps of a block's largest weight; the step itself is in F16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense Llama as released, imported and upcycled, with a tokenizer that has as many rows."""
    place = tmp_path_factory.mktemp("gguf")
    state = original_state("llama", "dense")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # as many rows as the tokenizer needs
        state[name] = state[name].repeat(384 // len(state[name]) + 1, 1)[:384]
    write_folder(place / "source", state, original_config("llama", "dense") | {"vocab_size": 384})
    import_checkpoint(place / "source", save=place / "run", tower=str(TOWER))
    upcycle_checkpoint(place / "run", save=place / "moe", moe=MoEConfig(placement=(1,)), noise_std=0.1)
    llama_folder(place / "tokenizer", "legacy_true", "both")
    return place


def exported(place, checkpoint: str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """{name: values} of both files."""
    folder = place / f"{checkpoint}-{kind}"
    if not folder.exists():
        tokenizer = place / "tokenizer"
        export_checkpoint(place / checkpoint, save=folder, layout="gguf", tokenizer=tokenizer, gguf_type=kind)
        verify_sums(folder, say=pytest.fail)
    readers = [GGUFReader(folder / name) for name in ("model.gguf", "mmproj.gguf")]
    text, vision = ({t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors} for reader in readers)
    return text, vision


def test_weights_are_those_of_the_checkpoint(place):
    text, vision = exported(place, "run", "f32")
    source = {name: value.float().numpy() for name, value in load_file(place / "source/model.safetensors").items()}
    assert np.array_equal(text["blk.0.ffn_down.weight"], source[f"{LAYERS}0.mlp.down_proj.weight"])
    assert np.array_equal(text["output.weight"], source["lm_head.weight"])
    first = source["model.mm_projector.image_spatial_proj.0.weight"]
    assert np.array_equal(vision["mm.0.weight"], first)
    # llama.cpp rotates neighbouring channels, the release halves of a head
    query, heads = (
        source[f"{LAYERS}0.self_attn.q_proj.weight"],
        original_config("llama", "dense")["num_attention_heads"],
    )
    half = len(query) // heads // 2
    assert np.array_equal(text["blk.0.attn_q.weight"][1], query[half]) and "v.post_ln.weight" not in vision


def test_a_dense_layer_of_a_moe_model_is_equal_experts_behind_a_router_of_zeros(place):
    text, _ = exported(place, "moe", "f32")
    dense, _ = exported(place, "run", "f32")
    copies = text["blk.0.ffn_up_exps.weight"]
    assert len(copies) == 4 and all(np.array_equal(copy, dense["blk.0.ffn_up.weight"]) for copy in copies)
    assert not text["blk.0.ffn_gate_inp.weight"].any() and text["blk.1.ffn_gate_inp.weight"].any()
    assert not np.array_equal(text["blk.1.ffn_up_exps.weight"][0], text["blk.1.ffn_up_exps.weight"][1])


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_rounding_stays_within_the_formats_step(place, kind):
    exact, _ = exported(place, "run", "f32")
    rounded, _ = exported(place, "run", kind)
    for name in ("blk.0.ffn_up.weight", "token_embd.weight"):
        blocks, close = (torch.from_numpy(np.array(part[name])).view(-1, 32) for part in (exact, rounded))
        step = Q8_0 if kind == "q8_0" else F16
        assert ((close - blocks).abs() <= step * blocks.abs().amax(-1, keepdim=True)).all()
    assert np.array_equal(exact["output_norm.weight"], rounded["output_norm.weight"])


@pytest.mark.parametrize("change", ["residual", "bias", "other weights", "no tokenizer"])
def test_what_llama_cpp_cannot_compute_is_refused(place, tmp_path, change):
    moe = {
        "residual": MoEConfig(use_residual=True),
        "bias": MoEConfig(moe_router_enable_expert_bias=True),
        "other weights": MoEConfig(moe_router_pre_softmax=True),
    }
    tokenizer = None if change == "no tokenizer" else place / "tokenizer"
    checkpoint = place / "run"
    if change in moe:
        checkpoint = tmp_path / "moe"
        upcycle_checkpoint(place / "run", save=checkpoint, moe=moe[change])
    with pytest.raises(ConfigError, match="--layout gguf"):
        export_checkpoint(checkpoint, save=tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tower, says",
    [
        ("naflex-tiny", "native resolution"),
        ("siglip-tiny@pixel_shuffle", "pixel shuffle"),
        ("siglip-tiny@newline", "tiled pictures"),
        ("siglip-tiny@original", "drops a tower's class token and no other feature"),
    ],
)
def test_a_tower_whose_features_llama_cpp_takes_otherwise_is_refused(place, tower, says):
    source = open_checkpoint(place / "run")
    for fits in ("clip-tiny", "siglip-tiny"):
        check_gguf(replace(source, model=replace(source.model, tower=get_tower(fits))), place / "tokenizer")
    with pytest.raises(ConfigError, match=says):
        check_gguf(replace(source, model=replace(source.model, tower=get_tower(tower))), place / "tokenizer")


def test_an_import_that_was_trained_with_tiles_is_refused(place):
    source = open_checkpoint(place / "run")
    run = replace(source.run, provenance={"trained_with": {"data": {"image_grid": True}}})
    with pytest.raises(ConfigError, match="tiled pictures"):
        check_gguf(replace(source, run=run), place / "tokenizer")


def test_narrow_experts_are_written_where_every_layer_has_some(place):
    """llama.cpp has one width for the experts of all layers, and a dense layer would become experts of another."""
    source = open_checkpoint(place / "run")
    half = source.model.backbone.ffn_hidden_size // 2
    for placement in ("dense", "sparse"):
        moe = MoEConfig(placement=placement, moe_ffn_hidden_size=half)
        narrow = replace(source, model=replace(source.model, moe=moe))
        if placement == "dense":
            check_gguf(narrow, place / "tokenizer")
        else:
            with pytest.raises(ConfigError, match="another width than the experts"):
                check_gguf(narrow, place / "tokenizer")


def test_latents_are_refused(place):
    source = open_checkpoint(place / "moe")
    backbone = get_backbone("deepseek-v3-tiny")
    with pytest.raises(ConfigError, match=r"llama\.cpp has no deepseek_v3 with experts of this kind"):
        check_gguf(
            replace(source, model=replace(source.model, backbone=backbone, moe=backbone.moe)), place / "tokenizer"
        )


def test_what_llama_cpp_makes_of_a_class_token_is_said(place):
    """Of a tower that has one (CLIP), and of no other."""
    source = open_checkpoint(place / "run")
    (note,) = gguf_notes(source)
    assert "25814" in note and source.model.tower.class_token
    without = replace(source.model.tower, class_token=False)
    assert gguf_notes(replace(source, model=replace(source.model, tower=without))) == []
