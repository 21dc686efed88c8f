"""An adapter finds its base by digest, and takes no other."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moellava.checkpoint.base import base_of, base_to_load, name_of_base
from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
from megatron_moellava.checkpoint.folders import iteration_folder
from megatron_moellava.config import CheckpointError


def checkpoint(save: Path, iteration: int = 0, **fields) -> Path:
    folder = iteration_folder(save, iteration)
    folder.mkdir(parents=True)
    write_description(folder, RunDescription(iteration=iteration, model={"backbone": save.name}, **fields))
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return checkpoint(tmp_path / "base", 3)


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    return checkpoint(tmp_path / "adapter", 1, adapter={"lora": {"rank": 2}, "base": name_of_base(base)})


def test_the_base_is_found_where_it_lay_and_where_it_was_moved_to(tmp_path, base, adapter):
    description = read_description(adapter)
    assert base_of(adapter, description) == base
    checkpoint(base.parent, 4)  # a newer one of the same run is another
    assert base_of(adapter, description) == base
    base.parent.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"is an adapter of .*base.* holds no checkpoint; .*moellava convert merge --base"
    ):
        base_of(adapter, description)
    assert base_of(adapter, description, tmp_path / "moved") == tmp_path / "moved/iter_0000003"


def test_another_base_is_refused(tmp_path, adapter):
    other = checkpoint(tmp_path / "other", 3)
    with pytest.raises(CheckpointError, match=r"is an adapter of .* is another checkpoint"):
        base_of(adapter, read_description(adapter), other)


def test_a_whole_model_has_no_base_and_an_adapter_is_none(base, adapter):
    assert base_of(base, read_description(base)) is None
    assert base_to_load(str(base)) == base and base_to_load(str(adapter)) is None and base_to_load(None) is None
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        name_of_base(adapter)


def test_only_an_adapter_says_so_in_its_file(base, adapter):
    """Whole models stay readable for versions that know no adapters."""
    assert '"adapter"' not in (base / "run.json").read_text() and '"adapter"' in (adapter / "run.json").read_text()
    assert replace(read_description(base), adapter=None) == read_description(base)
