"""Zeros that a class of transformers insists on."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from tests.helpers.conversion_models import (
    TOWER,
    original_config,
    original_state,
    write_folder,
)

UNSAID = {"template": "", "precision": ""}


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
