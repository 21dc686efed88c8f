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
from megatron_moellava.towers import Tower

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


def sequence_share(item: torch.Tensor, dim: int) -> torch.Tensor:
    """This tensor-parallel rank's positions under sequence parallelism of what every rank of the group has."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return item.chunk(size, dim)[parallel_state.get_tensor_model_parallel_rank()].contiguous()


def gather_positions(share_L: torch.Tensor) -> torch.Tensor:
    """The whole first axis in its order, from the shares of all ranks; gradients go back where they belong, summed."""
    size = parallel.context_parallel_size()
    group = parallel_state.get_context_parallel_group()
    gathered = gather_from_sequence_parallel_region(share_L.contiguous(), group=group)
    halves = gathered.chunk(2 * size)  # rank 0's early chunk, rank 0's late chunk, rank 1's early chunk, ...
    return torch.cat([*halves[0::2], *reversed(halves[1::2])])


def whole_rows(share_BL: torch.Tensor) -> torch.Tensor:
    """[B, S, ...] from [B, L, ...] of all ranks, on each of them."""
    return gather_positions(share_BL.transpose(0, 1)).transpose(0, 1)


def encode_share(encode, images_N: torch.Tensor, together: int = 1) -> torch.Tensor:
    """`encode` of all images, each rank doing its part of them; zero images make the parts equal and are dropped.

    `together`: so many images, the frames of a video, stay on one rank. `encode(images)`, or where some of them only fill up
    `encode(images, real=how many do not)`.
    """
    size, count = parallel.context_parallel_size(), len(images_N)
    if size == 1:
        return encode(images_N)
    missing = -count % (size * together)
    images_N = torch.cat([images_N, images_N.new_zeros(missing, *images_N.shape[1:])])
    rank, part = parallel.context_parallel_rank(), len(images_N) // size
    real = min(max(count - rank * part, 0), part)
    mine = encode(images_N.chunk(size)[rank], **({"real": real} if real < part else {}))
    return gather_from_sequence_parallel_region(mine, group=parallel_state.get_context_parallel_group())[:count]


def encode_share_of_grids(encode, patches_NCHW: torch.Tensor, grids, tower: Tower) -> torch.Tensor:
    """`encode` [V, D] of images of different sizes, dealt to the ranks by their cost, the dearest first.

    `grids`: (rows, columns) of each image's patches; the tower's `shuffle` x `shuffle` of them are one visual token. A
    rank without an image encodes the smallest one, so that no rank waits for its gradients; what fills up is dropped.
    """
    size = parallel.context_parallel_size()
    if size == 1:
        return encode(patches_NCHW, grids)
    patches = [rows * columns for rows, columns in grids]
    shares, shuffle = longest_first([tower.work(count) for count in patches], size), tower.shuffle
    mine = shares[parallel.context_parallel_rank()]
    parts = patches_NCHW.split(patches)
    if mine:
        features_VD = encode(torch.cat([parts[number] for number in mine]), tuple(grids[number] for number in mine))
    else:
        smallest = patches_NCHW.new_zeros(shuffle**2, *patches_NCHW.shape[1:])
        features_VD = encode(smallest, ((shuffle, shuffle),), real=0)
    tokens = [count // shuffle**2 for count in patches]
    longest = max(1, *(sum(tokens[number] for number in share) for share in shares))
    filled_VD = torch.cat([features_VD, features_VD.new_zeros(longest - len(features_VD), features_VD.shape[1])])
    gathered = gather_from_sequence_parallel_region(filled_VD, group=parallel_state.get_context_parallel_group())
    found = [gathered[:0]] * len(tokens)
    for rank, share_of_rank in enumerate(shares):
        start = rank * longest
        for number in share_of_rank:
            found[number] = gathered[start : start + tokens[number]]
            start += tokens[number]
    return torch.cat(found)


def longest_first(costs: list[float], ranks: int) -> list[list[int]]:
    """Numbers of the items of each rank: the dearest first, each to the rank that has least so far.

    >>> longest_first([1.0, 4.0, 2.0, 2.0], 2)
    [[1, 0], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = totals.index(min(totals))
        shares[rank].append(number)
        totals[rank] += costs[number]
    return shares


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
