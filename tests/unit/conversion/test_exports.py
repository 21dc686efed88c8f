"""What is written for others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from tests.helpers.conversion_models import (
    TOWER,
    original_config,
    original_state,
    write_folder,
)

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
