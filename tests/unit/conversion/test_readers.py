"""Damaged and strange files are errors that name them."""

import pytest
import torch

from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.readers import INSTEAD, open_bin, open_huggingface
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


def test_bin_tensors_that_share_storage_are_read(tmp_path):
    base = torch.randn(6, 4)
    state = {"whole": base, "rows": base[2:4], "tied": base, "alone": torch.randn(3)}
    torch.save(state, tmp_path / "shared.bin")
    opened = open_bin(tmp_path / "shared.bin")
    assert all(torch.equal(read(opened[name]), value) for name, value in state.items())
    torch.save({"columns": base[:, 1:3]}, tmp_path / "view.bin")
    with pytest.raises(CheckpointError, match="contiguous"):
        open_bin(tmp_path / "view.bin")


def test_files_that_are_no_archive_of_torch_are_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6; write it anew"):
        open_bin(tmp_path / "old.bin")
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_bin(tmp_path / "pointer.bin")
    (tmp_path / "cut.bin").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(CheckpointError, match="cut off"):
        open_bin(tmp_path / "cut.bin")


@pytest.mark.parametrize("name", INSTEAD)
def test_a_folder_of_something_else_is_named_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"it holds .*(merge|import|--projector|save|convert|weights)"):
        open_huggingface(tmp_path)
