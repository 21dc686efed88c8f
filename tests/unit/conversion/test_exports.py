"""What is written for others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError, ParallelConfig, to_dict
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.inference.load import inference_run
from tests.helpers.conversion_models import (
    TOWER,
    original_config,
    original_state,
    write_folder,
)
from tests.helpers.modalities import DEPTH
from tests.helpers.paths import ASSETS
from tests.helpers.served_models import CASES, checkpoint_of

UNSAID = {"template": "", "precision": ""}


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


def test_the_last_layer_of_another_tower_is_refused(tmp_path):
    """It would be written in another width than the rest, and nothing could load it."""
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    other = tmp_path / "wide"
    shutil.copytree(TOWER, other)
    config = json.loads((other / "config.json").read_text()) | {"hidden_size": 96}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="hidden_size=96 instead of 48"):
        export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original", tower=other)


def test_the_shared_expert_of_zeros_goes_out_and_comes_back_as_nothing(tmp_path):
    """transformers' Qwen2-MoE always has one; an expert that computes something is not passed over."""
    source = write_folder(tmp_path / "source", original_state("llama", "moe"), original_config("llama", "moe"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="transformers")
    import_checkpoint(tmp_path / "out", save=tmp_path / "again")
    export_checkpoint(tmp_path / "again", save=tmp_path / "back", layout="transformers")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "back"))
    shared = [name for name in first if ".shared_expert" in name]
    assert shared and not any(first[name].any() for name in shared)
    layers = [
        name for name in first if ".layers." in name
    ]  # each export without a tokenizer adds rows to the vocabulary
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in layers)
    down = next(name for name in shared if "down_proj" in name)
    (tmp_path / "out/SHA256SUMS").unlink()
    save_file(first | {down: torch.ones_like(first[down])}, tmp_path / "out/model.safetensors")
    with pytest.raises(ConfigError, match="no shared expert"):
        import_checkpoint(tmp_path / "out", save=tmp_path / "refused")


def test_modalities_travel_where_a_config_says_so_and_are_refused_where_pictures_would_be_shown_otherwise(tmp_path):
    said = {"trained_with": {"data": {"modalities": json.loads(json.dumps([to_dict(DEPTH)]))}}}
    config = original_config("llama", "dense") | said
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    run = inference_run(
        require_checkpoint(tmp_path / "run"), ParallelConfig(), tokenizer=str(ASSETS / "tok_spm"), **UNSAID
    )
    assert run.data.modalities == (DEPTH,), "what answers shows levels as in training"
    report = export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="original")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    assert any("the original knows no data.modalities" in note for note in report["notes"])
    for layout in ("transformers", "gguf"):
        with pytest.raises(ConfigError, match=f"--layout {layout} has no pictures of depth"):
            export_checkpoint(tmp_path / "run", save=tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_how_it_wants_to_be_asked_travels(tmp_path, layout):
    """A conversation version other than the family's, and what is shown of a video."""
    data = {"template": "short", "video_frames": 4, "image_aspect_ratio": "square"}
    config = original_config("llama", "dense") | {"trained_with": {"data": data}}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout=layout, tokenizer=ASSETS / "tok_spm")
    import_checkpoint(tmp_path / "out", save=tmp_path / "again", tower=str(TOWER) if layout == "original" else None)
    run = inference_run(
        require_checkpoint(tmp_path / "again"), ParallelConfig(), tokenizer=str(ASSETS / "tok_spm"), **UNSAID
    )
    assert {name: getattr(run.data, name) for name in data} == data


def test_a_language_model_alone_keeps_how_it_was_asked(tmp_path):
    """The conversation version and how boxes were written; with a projector beside it, whose own stage had another one."""
    data = {"template": "short", "box_format": "llava", "image_aspect_ratio": "square"}
    config = original_config("llama", "dense") | {"trained_with": {"data": data}}
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), config)
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout="language-model")
    kept = {name: data[name] for name in ("template", "box_format")}
    assert json.loads((tmp_path / "out/config.json").read_text())["trained_with"] == {"data": kept}
    import_checkpoint(tmp_path / "out", save=tmp_path / "again")
    run = inference_run(
        require_checkpoint(tmp_path / "again"), ParallelConfig(), tokenizer=str(ASSETS / "tok_spm"), **UNSAID
    )
    assert {name: getattr(run.data, name) for name in kept} == kept
    export_checkpoint(tmp_path / "run", save=tmp_path / "projector", layout="projector")
    beside = tmp_path / "projector/config.json"
    other = json.loads(beside.read_text())
    other["trained_with"]["data"]["template"] = "plain"
    beside.write_text(json.dumps(other))
    projector = tmp_path / "projector/mm_projector.bin"
    import_checkpoint(tmp_path / "out", save=tmp_path / "both", tower=str(TOWER), projector=projector, verify=False)
    said = read_description(require_checkpoint(tmp_path / "both")).provenance["trained_with"]["data"]
    assert {name: said[name] for name in kept} == kept


def test_experts_by_modality_are_not_handed_to_classes_without_them(tmp_path):
    """They would choose among all experts, and be another model."""
    checkpoint_of(CASES["Llama, experts by modality"], tmp_path)
    for layout in ("original", "language-model", "gguf"):
        with pytest.raises(ConfigError, match=r"moe\.expert_groups: .* export --layout transformers"):
            export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout=layout, tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()
