"""Damaged and strange files are errors that name them."""

import pickle

import pytest
import torch

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.readers import open_bin, open_huggingface
from tests.helpers.conversion_models import original_config, original_state, read, write_folder


def test_truncated_safetensors_is_an_error(tmp_path):
    source = write_folder(tmp_path / "source", original_state("llama", "dense"), original_config("llama", "dense"))
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_huggingface(source)


def test_missing_shard_of_an_index_is_named(tmp_path):
    state, config = original_state("llama", "dense"), original_config("llama", "dense")
    source = write_folder(tmp_path / "source", state, config, "sharded")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        open_huggingface(source)


def test_bin_with_code_in_it_does_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"a": Harmful()}, tmp_path / "bad.bin")
    with pytest.raises(CheckpointError, match="not a plain dictionary"):
        open_bin(tmp_path / "bad.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match="not a plain dictionary"):
        open_bin(tmp_path / "old.bin")


def test_bin_tensors_that_share_storage_are_read(tmp_path):
    base = torch.randn(6, 4)
    state = {"whole": base, "rows": base[2:4], "tied": base, "alone": torch.randn(3)}
    torch.save(state, tmp_path / "shared.bin")
    opened = open_bin(tmp_path / "shared.bin")
    assert all(torch.equal(read(opened[name]), value) for name, value in state.items())
    torch.save({"columns": base[:, 1:3]}, tmp_path / "view.bin")
    with pytest.raises(CheckpointError, match="contiguous"):
        open_bin(tmp_path / "view.bin")
