"""Quantised exports: transformers reads them with the library's own code, and gets the weights to a step of the format."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from benchmarks import quantised as measured
from megatron_moellava.backbones import BACKBONES, get_backbone
from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.huggingface import as_transformers
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.layout import TRANSFORMERS, entries
from megatron_moellava.conversion.quantised import IGNORED, is_quantised, quantised
from megatron_moellava.costs.shapes import Model
from tests.helpers.conversion_models import TOWER

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
# Half a step over the largest weight of a row or group: e4m3 has 3 bits behind the point; int4 is -8 to 7.
STEPS = {"fp8": 2**-4, "int4": 0.5 / 7.5 * 1.001}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=64))
    model.save_pretrained(place / "source")
    import_checkpoint(place / "source", save=place / "run", tower=str(TOWER))
    export_checkpoint(place / "run", save=place / "exact", layout="transformers")
    return place


@pytest.mark.parametrize("kind", STEPS)
def test_transformers_reads_the_weights_to_a_step(place, tmp_path, kind):
    export_checkpoint(place / "run", save=tmp_path / "out", layout="transformers", quantize=kind)
    stored = load_file(tmp_path / "out/model.safetensors")
    exact = load_file(place / "exact/model.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    assert sum(value.nbytes for key, value in stored.items() if key.startswith(name)) < exact[name].nbytes / 3
    kept = ("lm_head", "embed_tokens", "norm", "vision_tower", "multi_modal_projector")
    assert all(torch.equal(stored[key], exact[key]) for key in exact if any(part in key for part in kept))
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=settings, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    state = model.state_dict()
    for part in ("mlp.down_proj", "self_attn.q_proj"):
        ours = exact[f"language_model.model.layers.1.{part}.weight"]
        theirs = state[f"model.language_model.layers.1.{part}.weight"]
        assert 0 < (theirs - ours).abs().max() <= STEPS[kind] * ours.abs().max()
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        reference = transformers.AutoModelForImageTextToText.from_pretrained(place / "exact", dtype=torch.float32)
        assert torch.nn.functional.cosine_similarity(logits, reference(input_ids=tokens).logits, dim=-1).min() > 0.98


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.endswith("-tiny")])
def test_every_matrix_of_a_layer_is_quantised_or_in_the_configs_list(name):
    """Never both, and never neither: a reader takes all that is not in the list for quantised."""
    backbone = get_backbone(name)
    models = [Model(backbone=backbone, moe=backbone.moe)]
    if backbone.moe is None:
        models += [Model(backbone=backbone, moe=MoEConfig(use_residual=residual)) for residual in (False, True)]
    for entry in (entry for model in models for entry in entries(as_transformers(model), TRANSFORMERS)):
        for tensor, shape in zip(entry.names, entry.shapes, strict=True):
            module = tensor.removesuffix(".weight")
            ignored = any(re.match(pattern.removeprefix("re:"), module) for pattern in IGNORED)
            if ".layers." in tensor and len(shape) == 2:
                assert is_quantised(tensor, shape) != ignored, tensor


def test_experts_are_read_to_a_step_too(tmp_path):
    """Mixtral's, which files and memory call by different names."""
    sizes = SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "source")
    import_checkpoint(tmp_path / "source", save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="language-model", quantize="fp8")
    stored = load_file(tmp_path / "out/model.safetensors")
    experts = [name for name in stored if ".experts." in name and name.endswith(".weight")]
    assert len(experts) == 2 * 2 * 3 and {stored[name].dtype for name in experts} == {torch.float8_e4m3fn}
    settings = transformers.CompressedTensorsConfig(dequantize=True)
    read, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=settings, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    theirs, ours = read.state_dict(), model.state_dict()
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{part}"
        assert 0 < (theirs[name] - ours[name]).abs().max() <= STEPS["fp8"] * ours[name].abs().max()
    assert torch.equal(theirs["model.layers.1.mlp.gate.weight"], ours["model.layers.1.mlp.gate.weight"])


def test_names_of_which_none_is_known_are_refused():
    with pytest.raises(ConfigError, match="export --layout transformers"):
        quantised([], {}, "fp8")


def test_widths_that_groups_do_not_divide_and_other_layouts_are_refused(place, tmp_path):
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "source")
    import_checkpoint(tmp_path / "source", save=tmp_path / "run", tower=str(TOWER))
    with pytest.raises(ConfigError, match=r"multiple of 128 columns.*use fp8"):
        export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers", quantize="int4")
    with pytest.raises(ConfigError, match="--layout original cannot say it"):
        export_checkpoint(place / "run", save=tmp_path / "out", layout="original", quantize="fp8")
    assert not (tmp_path / "out").exists()


def test_the_page_of_what_rounding_costs_is_made_of_its_data():
    data = json.loads(measured.DATA.read_text())
    assert measured.PAGE.read_text() == measured.page(data)
    for kinds in data["runs"].values():
        for row in kinds.values():
            assert row["right"] - kinds["bf16"]["right"] == len(row["became_right"]) - len(row["became_wrong"])
        assert kinds["int4"]["bytes"] < kinds["fp8"]["bytes"] < kinds["bf16"]["bytes"]
