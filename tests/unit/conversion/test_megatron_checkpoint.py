"""Megatron checkpoints as conversions see them."""

import pytest

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.readers import open_megatron
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder


def test_incomplete_megatron_checkpoint_is_an_error(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    iteration = tmp_path / "run/iter_0000000"
    (iteration / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_megatron(iteration)
    (iteration / "run.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_checkpoint(tmp_path / "run")
