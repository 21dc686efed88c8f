"""Tensors as bytes in files. Reading one streams its rows through a small buffer, so its size never matters.

A tensor is seen as a matrix: the last axis is the columns, all others together the rows (a vector has one column).
`Tile`s say which file holds which rectangle of it. A safetensors file holds one tile per tensor; a Megatron
checkpoint one per shard, cut by rows or, for row-parallel layers, by columns.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_moellava.config import CheckpointError
from megatron_moellava.mapping import Shape

# Bytes read at a time. Small enough to stay in a processor's cache between the read and the write: measured 4 GB/s
# against 0.8 with 64 MB on a two-core virtual machine.
BLOCK = 1 << 20

ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
}


@dataclass(frozen=True, slots=True)
class Tile:
    """The rectangle [rows) x [columns) of a tensor, row by row from byte `offset` of file `path` on."""

    path: str
    offset: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in files, or (`make`) one that is computed when it is read: a new router, the noise on a copy."""

    shape: Shape
    dtype: str  # torch's name, e.g. "bfloat16"
    tiles: tuple[Tile, ...] = ()
    make: Callable[[], object] | None = None  # -> torch.Tensor of this shape and dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the tensor's own dtype."""
        return self.numel * ITEM_SIZES[self.dtype]

    @property
    def columns(self) -> int:
        """Length of the last axis; 1 for vectors, so that their elements are rows."""
        return self.shape[-1] if len(self.shape) > 1 else 1


def whole(path: str, offset: int, shape: Shape, dtype: str) -> Tensor:
    """A tensor that lies in one piece."""
    tensor = Tensor(tuple(shape), dtype)
    rows = tensor.numel // tensor.columns if tensor.numel else 0
    return Tensor(tensor.shape, dtype, (Tile(path, offset, (0, rows), (0, tensor.columns)),))


class Files:
    """Reads bytes by position, keeping files open. One buffer serves every read: use a block before asking for the next."""

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._buffer = memoryview(bytearray(BLOCK))

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, path: str, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` of the file. CheckpointError when the file ends before."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptors[path], [into[done:]], offset + done)
            if not count:
                raise CheckpointError(f"{path} ends at byte {offset + done}: the file is truncated; copy it again")
            done += count

    def blocks(self, tensor: Tensor, start: int, count: int) -> Iterator[memoryview]:
        """The bytes of `count` elements of a tensor from element `start` on (row-major), block by block."""
        if tensor.make is not None:
            yield _bytes_of(tensor.make())[start * ITEM_SIZES[tensor.dtype] :][: count * ITEM_SIZES[tensor.dtype]]
        elif all(tile.columns == (0, tensor.columns) for tile in tensor.tiles):
            yield from self._contiguous(tensor, start, count)
        else:
            yield from self._tiled(tensor, start, count)

    def _contiguous(self, tensor: Tensor, start: int, count: int) -> Iterator[memoryview]:
        size, stop = ITEM_SIZES[tensor.dtype], start + count
        for tile in tensor.tiles:
            tile_start = tile.rows[0] * tensor.columns
            first, last = max(start, tile_start), min(stop, tile.rows[1] * tensor.columns)
            offset = tile.offset + (first - tile_start) * size
            for position in range(0, (last - first) * size, BLOCK):
                block = self._buffer[: min(BLOCK, (last - first) * size - position)]
                self.read(tile.path, offset + position, block)
                yield block

    def _tiled(self, tensor: Tensor, start: int, count: int) -> Iterator[memoryview]:
        """Rows put together from tiles that are narrower than the tensor (shards of a row-parallel layer)."""
        size, columns = ITEM_SIZES[tensor.dtype], tensor.columns
        assert start % columns == 0 and count % columns == 0, "a mapping cut through a row"
        step = max(1, BLOCK // (columns * size))
        for row in range(start // columns, (start + count) // columns, step):
            yield memoryview(self._rows(tensor, row, min(row + step, (start + count) // columns))).cast("B")

    def columns(self, tensor: Tensor, start: int, count: int, wanted: tuple[int, int]) -> Iterator[memoryview]:
        """Columns `wanted` of the rows in `count` elements from `start` on; every block holds whole rows, as many for any
        division of the tensor into files."""
        size, columns, (first, end) = ITEM_SIZES[tensor.dtype], tensor.columns, wanted
        step = max(1, BLOCK // (columns * size))
        for row in range(start // columns, (start + count) // columns, step):
            rows = self._rows(tensor, row, min(row + step, (start + count) // columns))
            yield memoryview(rows.reshape(-1, columns * size)[:, first * size : end * size].copy()).cast("B")

    def _rows(self, tensor: Tensor, first: int, last: int):
        """A numpy array [rows, bytes of a row]."""
        import numpy

        size = ITEM_SIZES[tensor.dtype]
        rows = numpy.empty((last - first, tensor.columns * size), dtype=numpy.uint8)
        for tile in tensor.tiles:
            top, bottom = max(first, tile.rows[0]), min(last, tile.rows[1])
            if top < bottom:
                width = (tile.columns[1] - tile.columns[0]) * size
                piece = numpy.empty((bottom - top, width), dtype=numpy.uint8)
                self.read(tile.path, tile.offset + (top - tile.rows[0]) * width, memoryview(piece).cast("B"))
                rows[top - first : bottom - first, tile.columns[0] * size : tile.columns[1] * size] = piece
        return rows


def loaded(tensor: Tensor, start: int = 0, count: int | None = None):
    """`count` elements from `start` on, all by default, as a flat torch.Tensor in memory."""
    import torch

    with Files() as files:
        blocks = files.blocks(tensor, start, tensor.numel if count is None else count)
        content = bytearray().join(bytes(block) for block in blocks)  # a block is only valid until the next one
    return torch.frombuffer(content, dtype=getattr(torch, tensor.dtype))


def _bytes_of(tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def uncovered(tensor: Tensor) -> int:
    """Elements that no tile holds: not 0 when shards of a checkpoint are missing."""
    area = sum((tile.rows[1] - tile.rows[0]) * (tile.columns[1] - tile.columns[0]) for tile in tensor.tiles)
    return 0 if tensor.make is not None else tensor.numel - area
