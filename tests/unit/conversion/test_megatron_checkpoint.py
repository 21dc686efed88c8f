"""Megatron checkpoints as conversions see them."""

import shutil

import pytest

from megatron_moellava.checkpoint.folders import TRACKER, newest_checkpoint
from megatron_moellava.config import CheckpointError, MoEConfig
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.readers import open_megatron
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
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


@pytest.mark.parametrize("operation", ["upcycle", "import"])
def test_a_conversion_does_not_take_the_place_of_a_runs_newest_checkpoint(tmp_path, operation):
    """The tracker file would name it, and the run would be gone for all readers."""
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "start", tower=str(TOWER))
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "start/iter_0000000", run / "iter_0000004")
    (run / TRACKER).write_text("4\n")
    with pytest.raises(CheckpointError, match=r"run holds a run \(iter_0000004\).* choose another --save"):
        if operation == "upcycle":
            upcycle_checkpoint(run, save=run, moe=MoEConfig())
        else:
            import_checkpoint(source, save=run, tower=str(TOWER))
    assert newest_checkpoint(run) == run / "iter_0000004" and len(list(run.iterdir())) == 2


def test_what_is_a_checkpoint_already_is_not_imported(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=tmp_path / "run", tower=str(TOWER))
    for path in (tmp_path / "run", tmp_path / "run/iter_0000000"):
        with pytest.raises(CheckpointError, match="is a Megatron checkpoint already"):
            import_checkpoint(path, save=tmp_path / "again")
