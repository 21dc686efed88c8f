"""Converted models that several tests start from."""

from pathlib import Path

import pytest

from megatron_moellava.conversion.imports import import_checkpoint
from tests.helpers.conversion_models import TOWER, original_config, original_state, write_folder


@pytest.fixture(scope="session", params=["phi", "llama"])
def dense(request, tmp_path_factory):
    """(dense Megatron checkpoint, tensors that it was imported from)."""
    folder = tmp_path_factory.mktemp(request.param)
    state = original_state(request.param, "dense")
    source = write_folder(folder / "source", state, original_config(request.param, "dense"))
    import_checkpoint(source, save=folder / "dense", tower=str(TOWER))
    return folder / "dense", state


@pytest.fixture(scope="session")
def imported(tmp_path_factory) -> Path:
    """A dense Llama as released, as a Megatron checkpoint. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("imported")
    source = write_folder(folder / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    import_checkpoint(source, save=folder / "run", tower=str(TOWER))
    return folder / "run"
