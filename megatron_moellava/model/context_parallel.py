"""Context parallelism: each rank of a group keeps a share of every row's positions.

A row of S positions is cut into 2 * size chunks; rank r holds chunks r and 2 * size - 1 - r, as Megatron-Core's batches
are cut. Causal attention makes late positions dear and early ones cheap, and every rank has some of both.

Attention gathers keys and values of the whole row (they are small with grouped queries), each rank attends with its own
queries, and the backward pass sums the gradients of keys and values to where they belong. A packed row stays whole: its
samples may be cut anywhere, so that nothing is padded for it. Shapes: S positions of a row, L of this rank, B rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch

from megatron_moellava import parallel

from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def chunks_of_rank(length: int, size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """[start, stop) of the chunks that a rank holds: 8 positions, 2 ranks -> rank 0 has (0, 2) and (6, 8)."""
    if size == 1:
        return ((0, length),)
    assert length % (2 * size) == 0, f"{length} positions cannot be cut into {2 * size} chunks"
    chunk = length // (2 * size)
    return tuple((index * chunk, (index + 1) * chunk) for index in (rank, 2 * size - 1 - rank))


@overload
def share(whole: torch.Tensor, dim: int = 1) -> torch.Tensor: ...
@overload
def share(whole: None, dim: int = 1) -> None: ...
def share(whole: torch.Tensor | None, dim: int = 1) -> torch.Tensor | None:
    """This rank's positions of a tensor that every rank of the group has whole."""
    size = parallel.context_parallel_size()
    if whole is None or size == 1:
        return whole
    chunks = chunks_of_rank(whole.shape[dim], size, parallel.context_parallel_rank())
    return torch.cat([whole.narrow(dim, start, stop - start) for start, stop in chunks], dim)


def gather_positions(share_L: torch.Tensor) -> torch.Tensor:
    """The whole first axis in its order, from the shares of all ranks; gradients go back where they belong, summed."""
    size = parallel.context_parallel_size()
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(share_L.contiguous(), group=group)
    halves = gathered.chunk(2 * size)  # rank 0's early chunk, rank 0's late chunk, rank 1's early chunk, ...
    return torch.cat([*halves[0::2], *reversed(halves[1::2])])


def encode_share(encode, images_N: torch.Tensor) -> torch.Tensor:
    """`encode` of all images, each rank doing its part of them; zero images make the parts equal and are dropped."""
    size, count = parallel.context_parallel_size(), len(images_N)
    if size == 1:
        return encode(images_N)
    missing = -count % size
    images_N = torch.cat([images_N, images_N.new_zeros(missing, *images_N.shape[1:])])
    mine = encode(images_N.chunk(size)[parallel.context_parallel_rank()])
    return gather_from_sequence_parallel_region(mine, group=parallel_state.get_context_parallel_group())[:count]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that look at the same keys: those of one sample within one chunk. The last query sees the last key."""

    queries: slice  # of this rank's positions
    keys: slice  # of the whole row


def attention_pieces(chunks: tuple[tuple[int, int], ...], boundaries: list[int]) -> Iterator[Piece]:
    """Chunks (0, 2) and (6, 8), samples [0, 3, 8]: queries 0..1 look at keys 0..1, queries 2..3 at keys 3..7."""
    local = 0
    for start, stop in chunks:
        for first, end in pairwise(boundaries):
            here, there = max(start, first), min(stop, end)
            if here < there:
                yield Piece(slice(local, local + there - here), slice(first, there))
                local += there - here
