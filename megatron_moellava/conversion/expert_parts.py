"""What a new expert is made of: a part of an MLP's inner width, with a share of its inner columns drawn anew.

Granularity G (arXiv 2410.07524): every copy of the MLP becomes G experts, each with 1/G of the inner columns. All G rows of a
copy in the router are equal, so that top-(k * G) picks the copies that top-k would, each with all its parts. Each part then
has 1/G of its copy's weight, so the output matrix is multiplied by G, and the parts sum to the MLP.

Drop (arXiv 2502.19261): equal copies learn slowly. Of every copy a random share of the inner columns (of gate and up, and the
rows of down that read them) is replaced by normal numbers with mean and standard deviation of the whole matrix.

All draws come from streams named after the tensor and the expert, so they depend on the seed and on nothing else.
"""

import functools
from dataclasses import dataclass
from typing import Any

from megatron_moellava.conversion.initial import generator
from megatron_moellava.conversion.recipes import Edit, Part
from megatron_moellava.conversion.tensors import Files, Tensor
from megatron_moellava.costs.shapes import EXPERTS

FC1, FC2 = "linear_fc1.", "linear_fc2."


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How experts are cut out of an MLP."""

    inner: int  # width of the MLP
    gated: bool  # fc1 is [gate; up], each `inner` high
    granularity: int = 1  # experts that one copy is divided into
    drop: float = 0.0  # share of an expert's inner columns that is drawn anew
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """Experts are whole copies."""
        return self.granularity == 1 and not self.drop

    @property
    def width(self) -> int:
        """Inner columns of one expert."""
        return self.inner // self.granularity


def expert_parts(
    name: str, number: int, source: str, tensor: Tensor, base: int, size: int, division: Division
) -> tuple[Part, ...]:
    """The parts of expert `number` in tensor `name`, from the MLP of `size` elements at element `base` of `tensor`."""
    layer, _, tail = name.partition(EXPERTS)
    width, first = division.width, number % division.granularity * division.width
    if tail == f"{FC2}bias":  # the weights of a copy's parts sum to the copy's, and so do their biases
        return (Part(source, base, size),)
    if tail.startswith(FC2):
        rows = size // tensor.columns
        edit = _redraw(name, number, 0, layer, 1, (rows, width), (tensor, base, size), division)
        return (Part(source, base, rows * width, edit, (first, first + width)),)
    matrices = 2 if division.gated else 1
    columns = size // (matrices * division.inner)  # a bias has one
    parts = []
    for half in range(matrices):
        start, span = base + half * division.inner * columns, division.inner * columns
        edit = _redraw(name, number, half, layer, 0, (width, columns), (tensor, start, span), division)
        cut = None if tail.endswith("bias") else (0, columns)
        parts.append(Part(source, start + first * columns, width * columns, edit, cut))
    return tuple(parts)


def redrawn_columns(layer: str, number: int, division: Division):
    """The inner columns that expert `number` of a layer gets anew: the same for all its matrices. Sorted indices, int64."""
    import torch

    order = torch.randperm(division.width, generator=generator(division.seed, f"{layer} {number} columns"))
    return order[: round(division.drop * division.width)].sort().values


def _redraw(name, number, half, layer, axis, shape, matrix, division) -> Edit | None:
    chosen = redrawn_columns(layer, number, division)
    return Redraw(f"{name} {number} {half}", axis, shape, chosen, matrix, division.seed) if len(chosen) else None


class Redraw:
    """Puts N(mean, std) of a whole matrix in place of the rows (axis 0) or columns (axis 1) `chosen` of what passes.

    `shape`: of what passes, in blocks of whole rows. `matrix`: (tensor, first element, elements) that the moments are of.
    """

    def __init__(self, stream: str, axis: int, shape: tuple[int, int], chosen, matrix, seed: int):
        self.stream, self.axis, self.shape, self.chosen, self.matrix, self.seed = (
            stream,
            axis,
            shape,
            chosen,
            matrix,
            seed,
        )
        self.row = 0
        self.drawn: Any = None  # a tensor, while a matrix passes

    def __call__(self, block):
        """A flat block in its own dtype -> the same with new values."""
        values = block.view(-1, self.shape[1]).clone()
        if self.row == 0:
            self.drawn = self._draw()
        rows = range(self.row, self.row + len(values))
        if self.axis == 1:
            values[:, self.chosen] = self.drawn[rows.start : rows.stop].to(values.dtype)
        else:
            here = (self.chosen >= rows.start) & (self.chosen < rows.stop)
            values[self.chosen[here] - rows.start] = self.drawn[here].to(values.dtype)
        self.row = rows.stop % self.shape[0]
        if self.row == 0:
            self.drawn = None
        return values.view(-1)

    def _draw(self):
        import torch

        mean, std = moments(*self.matrix)
        count = len(self.chosen)
        shape = (count, self.shape[1]) if self.axis == 0 else (self.shape[0], count)
        return mean + std * torch.randn(shape, generator=generator(self.seed, self.stream))


@functools.lru_cache(maxsize=1024)
def moments(tensor: Tensor, start: int, count: int) -> tuple[float, float]:
    """(mean, standard deviation) of a stretch of a tensor, summed in fp64 in blocks that no division into files changes."""
    import torch

    total = squares = 0.0
    with Files() as files:
        rows = start % tensor.columns == 0 and count % tensor.columns == 0
        blocks = (
            files.columns(tensor, start, count, (0, tensor.columns)) if rows else _joined(files, tensor, start, count)
        )
        for block in blocks:
            values = torch.frombuffer(block, dtype=getattr(torch, tensor.dtype)).double()
            total, squares = total + values.sum().item(), squares + values.square().sum().item()
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0) ** 0.5


def _joined(files: Files, tensor: Tensor, start: int, count: int):
    yield bytearray().join(bytes(block) for block in files.blocks(tensor, start, count))
