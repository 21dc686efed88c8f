"""Quantised folders come back: our own exports, and what we cannot read is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from tests.helpers.conversion_models import TOWER

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
LAYER = "language_model.model.layers.0."
# Half a step over the largest weight of a row or group: e4m3 has 3 bits behind the point; int4 is -8 to 7.
STEPS = {"fp8": 2**-4, "int4": 0.5 / 7.5 * 1.001}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint in bf16, and its exports: exact, fp8, int4."""
    place = tmp_path_factory.mktemp("dequantised")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "source")
    import_checkpoint(place / "source", save=place / "run", tower=str(TOWER), dtype="bfloat16")
    for kind in (None, *STEPS):
        export_checkpoint(place / "run", save=place / str(kind), layout="transformers", quantize=kind)
    return place


@pytest.mark.parametrize("kind", STEPS)
def test_a_quantised_export_is_read_to_a_step_and_only_once(place, tmp_path, kind):
    """What comes back is what transformers makes of the folder, and quantising it again changes nothing."""
    report = import_checkpoint(place / kind, save=tmp_path / "run")
    assert report["dequantised"] == {"fp8": "float-quantized", "int4": "pack-quantized"}[kind]
    export_checkpoint(tmp_path / "run", save=tmp_path / "exact", layout="transformers")
    found, exact = load_file(tmp_path / "exact/model.safetensors"), load_file(place / "None/model.safetensors")
    assert found.keys() == exact.keys() and "quantization_config" not in json.loads(
        (tmp_path / "exact/config.json").read_text()
    )
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        place / kind, dtype=torch.float32, quantization_config=settings
    ).state_dict()
    for name in exact:
        if name.startswith(LAYER) and exact[name].dim() == 2:
            assert found[name].dtype == torch.bfloat16
            assert 0 < (found[name] - exact[name]).abs().max() <= (STEPS[kind] + 2**-8) * exact[name].abs().max()
            same = theirs[name.replace("language_model.model.", "model.language_model.")]
            assert torch.equal(found[name], same.bfloat16())
        else:
            assert torch.equal(found[name], exact[name])


def changed(place, tmp_path, settings: dict | None = None, tensors: dict | None = None):
    """A copy of the int4 export with other settings, or without some tensors."""
    folder = tmp_path / "changed"
    folder.mkdir()
    config = json.loads((place / "int4/config.json").read_text())
    config["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors or load_file(place / "int4/model.safetensors"), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"quant_method": "gptq"},
            r"quant_method='gptq' cannot be read, only 'compressed-tensors'; import the model as",
        ),
        ({"config_groups": {}}, "has 0 kind"),
        ({"config_groups": {"group_0": {"targets": 3}}}, "says nothing to compressed-tensors"),
    ],
)
def test_other_formats_are_refused_in_one_sentence(place, tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        import_checkpoint(changed(place, tmp_path, settings), save=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_matrix_without_its_scales_is_missed(place, tmp_path):
    tensors = load_file(place / "int4/model.safetensors")
    del tensors[f"{LAYER}mlp.up_proj.weight_scale"]
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight"):
        import_checkpoint(changed(place, tmp_path, tensors=tensors), save=tmp_path / "run")
