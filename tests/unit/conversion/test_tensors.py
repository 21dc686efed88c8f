"""Tensors made of pieces of files."""

import itertools

import pytest
import torch

from megatron_moellava.conversion.readers import open_bin
from megatron_moellava.conversion.tensors import BLOCK, Files, Tensor, Tile, loaded
from tests.helpers.conversion_models import read


@pytest.mark.parametrize("cuts", [(0, 10), (0, 5, 10), (0, 4, 6, 10)], ids=["one file", "two", "three"])
def test_columns_of_rows_are_read_in_whole_rows(tmp_path, cuts):
    """However a row-parallel weight was divided among ranks."""
    whole = torch.arange(6 * 10, dtype=torch.float32).view(6, 10)
    tiles = []
    for first, end in itertools.pairwise(cuts):
        (tmp_path / str(first)).write_bytes(whole[:, first:end].contiguous().numpy().tobytes())
        tiles.append(Tile(str(tmp_path / str(first)), 0, (0, 6), (first, end)))
    tensor = Tensor((6, 10), "float32", tuple(tiles))
    with Files() as files:
        content = b"".join(bytes(block) for block in files.columns(tensor, 20, 30, (3, 7)))
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.float32).view(3, 4), whole[2:5, 3:7])


def test_tensor_cut_by_columns_is_put_together(tmp_path):
    """Row-parallel weights are stored as shards that are narrower than the tensor."""
    whole = torch.arange(6 * 10, dtype=torch.float32).view(6, 10)
    left, right = whole[:, :4].contiguous(), whole[:, 4:].contiguous()
    (tmp_path / "left").write_bytes(left.numpy().tobytes())
    (tmp_path / "right").write_bytes(right.numpy().tobytes())
    tiles = (
        Tile(str(tmp_path / "left"), 0, (0, 6), (0, 4)),
        Tile(str(tmp_path / "right"), 0, (0, 6), (4, 10)),
    )
    assert torch.equal(read(Tensor((6, 10), "float32", tiles)), whole)


def test_tensors_larger_than_a_block_stream_through(tmp_path):
    state = {"big": torch.arange(BLOCK // 2 + 3, dtype=torch.int32)}
    torch.save(state, tmp_path / "big.bin")
    opened = open_bin(tmp_path / "big.bin")["big"]
    assert torch.equal(read(opened), state["big"])
    assert torch.equal(loaded(opened), state["big"]) and torch.equal(loaded(opened, 3, BLOCK // 2), state["big"][3:])
