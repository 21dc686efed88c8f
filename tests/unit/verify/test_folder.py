"""Recordings on disk: what is missing, empty, unread or damaged."""

import pytest
import torch

from megatron_moellava.config import DataError
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.table import Table


def test_missing_empty_and_unread_recordings_are_said(tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe/model.safetensors").write_bytes(b"")
    (tmp_path / "routes.json").write_text("{}")
    torch.save({}, tmp_path / "moe.pt")
    said = Folder(tmp_path).left_out(("dense", "moe"))
    for line in (
        "moe.pt is empty",
        "names.json is not there",
        "routes.json: no case reads it",
        "data/scoring.json is not there",
    ):
        assert line in said
    assert "not compared: moe.pt is empty" in Table(left_out=said).render()


def test_a_damaged_recording_is_an_error_of_the_data(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "moe.pt")
    (tmp_path / "moe.pt").write_bytes((tmp_path / "moe.pt").read_bytes()[:700])
    with pytest.raises(DataError, match=r"moe.pt cannot be read .*record or copy it again"):
        Folder(tmp_path).load("moe.pt")
