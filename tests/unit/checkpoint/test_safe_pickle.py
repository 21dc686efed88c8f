"""Files from elsewhere cannot run code here: checkpoints, and names that a shell could take for commands."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_moellava.checkpoint import safe_pickle
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.readers import open_bin, open_megatron


class Payload:
    """Unpickled by `pickle.load`, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def checkpoint(tmp_path):
    """A small folder as Megatron-Core's torch_dist format has it."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "iter_0000001"
    dcp.save({"weight": torch.arange(6.0).reshape(2, 3), "note": {"plain": [1, "two"]}}, checkpoint_id=folder)
    safe_pickle.guard()
    return folder


def load(folder: Path) -> dict:
    import torch.distributed.checkpoint as dcp

    state = {"weight": torch.zeros(2, 3), "note": {"plain": [0, ""]}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_a_good_checkpoint_loads(checkpoint):
    state = load(checkpoint)
    assert torch.equal(state["weight"], torch.arange(6.0).reshape(2, 3))
    assert state["note"] == {"plain": [1, "two"]}
    assert open_megatron(checkpoint)["weight"].shape == (2, 3)


def test_metadata_that_asks_for_anything_else_is_refused_unexecuted(checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    for read in (open_megatron, load):
        with pytest.raises((CheckpointError, torch.distributed.checkpoint.CheckpointException), match="mkdir"):
            read(checkpoint)
    assert not (tmp_path / "executed").exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # noqa: S301  the control: torch's own way would have run it
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle"])
def test_broken_metadata_says_so(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        open_megatron(checkpoint)


def test_objects_beside_the_tensors_are_plain_data(tmp_path):
    """What torch itself reads with weights_only=False; the payload is saved as any state dict would be."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "iter_0000002"
    dcp.save({"note": Payload(tmp_path / "executed")}, checkpoint_id=folder)
    safe_pickle.guard()
    with pytest.raises((CheckpointError, dcp.CheckpointException), match="more than plain data"):
        dcp.load({"note": io.BytesIO()}, checkpoint_id=folder, no_dist=True)
    assert not (tmp_path / "executed").exists()


def test_common_file_of_older_checkpoints_is_plain_data(tmp_path):
    from megatron.core.dist_checkpointing.strategies.common import load_common

    torch.save({"note": Payload(tmp_path / "executed")}, tmp_path / "common.pt")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        load_common(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_bin_file_with_code_in_it_is_refused_unexecuted(tmp_path):
    torch.save({"weight": Payload(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        open_bin(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "executed").exists()
