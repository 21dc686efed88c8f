"""The table of a verification says what is wrong, also when a difference has no size, and what it leaves out."""

import math

import pytest
import torch

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.verify.command import base_run
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.table import Table


@pytest.mark.parametrize("ours", [[math.nan], [math.inf], [1.0, 2.0]])
def test_an_infinite_difference_names_its_case(ours):
    table = Table()
    table.close("dense eval/single", "logits", ours, [1.0], 1e-4)
    table.named("dense train", "gradients", {}, 1e-4)
    text = table.render()
    assert "dense eval/single" in text and "inf" in text and "FAIL  nothing to compare" in text
    assert "2 quantities compared, 2 failed" in text and not table.passes


def test_missing_empty_and_unread_recordings_are_said(tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe/model.safetensors").write_bytes(b"")
    (tmp_path / "sampler_schedule.json").write_text("{}")
    torch.save({}, tmp_path / "moe.pt")
    said = Folder(tmp_path).left_out(("dense", "moe"))
    for line in ("moe.pt is empty", "names.json is not there", "sampler_schedule.json: no case reads it"):
        assert line in said
    assert "not compared: moe.pt is empty" in Table(left_out=said).render()


def test_a_damaged_recording_is_an_error_of_the_data(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "moe.pt")
    (tmp_path / "moe.pt").write_bytes((tmp_path / "moe.pt").read_bytes()[:700])
    with pytest.raises(DataError, match=r"moe.pt cannot be read .*record or copy it again"):
        Folder(tmp_path).load("moe.pt")


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.context_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=false"],
    ],
)
def test_a_layout_that_cannot_be_verified_is_refused(overrides):
    with pytest.raises(ConfigError, match="cannot be verified"):
        base_run(overrides)
    assert base_run(["parallel.tensor_model_parallel_size=2"])
