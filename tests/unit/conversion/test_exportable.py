"""What a layout cannot hold is refused before anything is written."""

import json

import pytest
from safetensors.torch import load_file

from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.config import CheckpointError, ConfigError, ParallelConfig, to_dict
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
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


def test_experts_by_modality_are_not_handed_to_classes_without_them(tmp_path):
    """They would choose among all experts, and be another model."""
    checkpoint_of(CASES["Llama, experts by modality"], tmp_path)
    for layout in ("original", "language-model", "gguf"):
        with pytest.raises(ConfigError, match=r"moe\.expert_groups: .* export --layout transformers"):
            export_checkpoint(tmp_path / "run", save=tmp_path / "out", layout=layout, tokenizer=tmp_path / "tokenizer")
    assert not (tmp_path / "out").exists()
