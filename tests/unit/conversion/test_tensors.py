"""Tensors made of pieces of files."""

import torch

from megatron_moellava.conversion.readers import open_bin
from megatron_moellava.conversion.tensors import BLOCK, Tensor, Tile, loaded
from tests.helpers.conversion_models import read


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
