"""`Batch`: one micro-batch, packed or padded. Suffixes: B rows, S positions, N images, C H W channels and pixels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, EncodedSample
from megatron_moellava.data.pooling import Pools
from megatron_moellava.data.quantities import PLAIN, kinds_of

SHARED = ""  # the way of pictures that go through the model's own tower and projector


@dataclass(frozen=True, slots=True)
class Counts:
    """What a batch holds, as numbers of the host: a training step must not wait for the device to learn them."""

    samples: int
    loss_tokens: int  # positions with a label
    real_tokens: int  # positions that are no padding
    positions: int  # padding included
    image_rows: int  # positions of visual tokens
    squared_lengths: int  # sum of length ** 2 over the samples: twice the pairs that causal attention needs
    attended: int  # the same of what is computed: pad tails are segments, padded rows are as long as the longest
    pairs: int = 0  # of answers, chosen and rejected
    chosen_tokens: int = 0  # positions with a label, of the chosen answers
    tower_inputs: int = 0  # pictures, tiles and frames that the tower encodes; at native resolution: patches
    tower_squares: int = 0  # at native resolution: sum of patches ** 2 over the pictures
    apart_inputs: tuple[int, ...] = ()  # pictures and tiles of each modality in `Batch.apart`

    def numbers(self) -> list[int]:
        """All of them in a row."""
        *own, apart = astuple(self)
        return [*own, *apart]


def counts_of(numbers: Sequence[int]) -> Counts:
    """The inverse of `Counts.numbers`."""
    *own, _ = (item.name for item in fields(Counts))
    return Counts(**dict(zip(own, numbers, strict=False)), apart_inputs=tuple(numbers[len(own) :]))


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch. B is 1 when packed; a padded batch has one sample in each row."""

    tokens_BS: torch.Tensor  # int64; an image is its number of IMAGE_TOKEN
    labels_BS: torch.Tensor  # int64, shifted: the target of this position; -100 = no loss
    position_ids_BS: torch.Tensor  # int64, from 0 in every sample
    padding_mask_BS: torch.Tensor  # bool, True = real token
    cu_seqlens: torch.Tensor | None  # int32 [n + 1]: packed samples of the one row, the pad tail is the last; or None
    max_seqlen: int  # longest sample
    pixel_values_NCHW: (
        torch.Tensor
    )  # float32, in the order of the image tokens; N may be 0. At native resolution: patches
    sample_ids: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    grids: tuple[tuple[int, ...], ...] = ()  # how the tokens of each lie (`Plan.grid`), of towers that have that
    # Pairs of answers (data/pairs.py): segments 2p and 2p + 1 are the chosen and the rejected one of pair p.
    pairs: list[int] = field(default_factory=list)  # their numbers in the data set
    reference_P2: torch.Tensor | None = None  # fp32, log-probabilities of the answers by the reference
    shows_R: torch.Tensor | None = None  # int64: which visual token each of the image rows is; None: all in turn
    rows: list[int] = field(default_factory=list)  # the samples' numbers in the data set
    # Of each label, in the order of the rows: the teacher's likeliest tokens, and log-probabilities of these and of all
    # others together (data/teacher_logits.py).
    teacher_ids_TK: torch.Tensor | None = None  # int32
    teacher_log_probs_TC: torch.Tensor | None = None  # fp16 or fp32, C = K + 1
    pools: Pools = ()  # images that become one set of visual tokens, and which neighbours one token; empty: each its own
    # Of each modality that is apart (`config.Modality`): the pixels of its pictures, which are not in pixel_values_NCHW. Their
    # visual tokens follow those, in this order, and shows_R says where each belongs.
    apart: dict[str, torch.Tensor] = field(default_factory=dict)
    # (modality, visual tokens) of each picture in the order of the image tokens; empty: all pictures are plain ones
    pictures: tuple[tuple[str, int], ...] = ()
    counts: Counts = None  # type: ignore[assignment]  # taken from the tensors when the batch is made, on the host, and carried along

    def __post_init__(self) -> None:
        if self.counts is None:
            self.counts = count(self)


def count(batch: Batch) -> Counts:
    """The counts of a batch whose tensors are on the host.

    >>> a packed row with cu_seqlens [0, 3, 5, 8], the last 3 padding -> squared_lengths 9 + 4, attended 9 + 4 + 9
    >>> rows of 4 and 2 tokens padded to 4 -> squared_lengths 16 + 4, attended 16 + 16
    """
    real_tokens = int(batch.padding_mask_BS.sum())
    if batch.cu_seqlens is None:
        rows, width = batch.tokens_BS.shape
        lengths, computed = batch.padding_mask_BS.sum(dim=1), torch.full((rows,), width)
    else:
        computed = batch.cu_seqlens.diff().long()
        lengths = computed[batch.cu_seqlens[1:] <= real_tokens]  # without the pad tail
    return Counts(
        samples=len(batch.sample_ids),
        loss_tokens=int((batch.labels_BS != IGNORE_INDEX).sum()),
        real_tokens=real_tokens,
        positions=batch.tokens_BS.numel(),
        image_rows=int((batch.tokens_BS == IMAGE_TOKEN).sum()),
        squared_lengths=int((lengths**2).sum()),
        attended=int((computed**2).sum()),
        pairs=len(batch.pairs),
        chosen_tokens=_chosen_tokens(batch),
        tower_inputs=len(batch.pixel_values_NCHW),
        tower_squares=sum(math.prod(grid) ** 2 for grid in batch.grids if len(grid) == 2),
        apart_inputs=tuple(map(len, batch.apart.values())),
    )


def _chosen_tokens(batch: Batch) -> int:
    if not batch.pairs:
        return 0
    assert batch.cu_seqlens is not None, "pairs are packed"
    segments = (batch.labels_BS[0] != IGNORE_INDEX).tensor_split(batch.cu_seqlens[1:-1].long())
    return int(sum(part.sum() for part in segments[: 2 * len(batch.pairs) : 2]))


def total(counts: Iterable[Counts]) -> Counts:
    """The counts of several batches together."""
    return counts_of(list(map(sum, zip(*(item.numbers() for item in counts), strict=True))))


_SMALL = (
    "tokens_BS",
    "labels_BS",
    "position_ids_BS",
    "padding_mask_BS",
    "cu_seqlens",
    "reference_P2",
    "shows_R",
    "teacher_ids_TK",
    "teacher_log_probs_TC",
)


def to_wire(batch: Batch) -> Batch:
    """For the way out of a worker process: torch fetches every tensor over a connection of its own, which takes longer
    than a small one's bytes in the message. Pixels stay a tensor, and go into shared memory here: where that is too small,
    the thread that sends them would only print so, and the other end would wait for ever."""
    if get_worker_info() is not None and batch.pixel_values_NCHW is not None:
        for pixels_NCHW in (batch.pixel_values_NCHW, *batch.apart.values()):
            pixels_NCHW.share_memory_()
    small = {name: getattr(batch, name) for name in _SMALL}
    return replace(batch, **{name: value.numpy() for name, value in small.items() if value is not None})


def from_wire(batch: Batch) -> Batch:
    """The batch with tensors again in place of the arrays that `to_wire` made."""
    small = {name: getattr(batch, name) for name in _SMALL}
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in small.items() if value is not None}
    return replace(batch, **tensors)


def pack(
    samples: list[EncodedSample],
    pixels: list[np.ndarray],
    seq_length: int,
    pad_id: int,
    shape,
    apart: Sequence[str] = (),
    shown: list[EncodedSample] | None = None,
) -> Batch:
    """One row of exactly seq_length. `pixels`: [T, 3, H, W] of each image; `shape`: (3, H, W) of plain ones; `apart`: the
    modalities of the run that are. `shown`: samples whose images `pixels` are, where `samples` share them.

    >>> lengths 3 and 2, seq_length 8 -> cu_seqlens [0, 3, 5, 8], position_ids [0 1 2 0 1 0 1 2]
    """
    lengths = [len(sample) for sample in samples]
    tail = seq_length - sum(lengths)
    assert tail >= 0, "more tokens than the row holds"
    segments = [*lengths, tail] if tail else lengths
    tokens = np.concatenate([*(sample.tokens_S for sample in samples), np.full(tail, pad_id, dtype=np.int64)])
    labels = np.concatenate([*(sample.labels_S for sample in samples), np.full(tail, IGNORE_INDEX, dtype=np.int64)])
    positions = np.concatenate([np.arange(length) for length in segments])
    return Batch(
        tokens_BS=torch.from_numpy(tokens)[None],
        labels_BS=torch.from_numpy(labels)[None],
        position_ids_BS=torch.from_numpy(positions)[None],
        padding_mask_BS=(torch.arange(seq_length) < seq_length - tail)[None],
        cu_seqlens=torch.tensor(np.cumsum([0, *segments]), dtype=torch.int32),
        max_seqlen=max(segments),
        **_pixels(samples if shown is None else shown, pixels, shape, apart),
        sample_ids=[sample.id for sample in samples],
        tags=[sample.tag for sample in samples],
        grids=tuple(grid for sample in samples for grid in sample.grids if grid),
        pools=tuple(pool for sample in samples for pool in sample.pools),
        pictures=_pictures(samples),
    )


def pad(
    samples: list[EncodedSample],
    pixels: list[np.ndarray],
    multiple: int,
    pad_id: int,
    shape,
    apart: Sequence[str] = (),
) -> Batch:
    """One row per sample, right-padded to the longest, rounded up to a multiple."""
    longest = max(len(sample) for sample in samples)
    width = -(-longest // multiple) * multiple
    tokens_BS = torch.full((len(samples), width), pad_id, dtype=torch.int64)
    labels_BS = torch.full((len(samples), width), IGNORE_INDEX, dtype=torch.int64)
    lengths_B = torch.tensor([len(sample) for sample in samples])
    for row, sample in enumerate(samples):
        tokens_BS[row, : len(sample)] = torch.from_numpy(sample.tokens_S)
        labels_BS[row, : len(sample)] = torch.from_numpy(sample.labels_S)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        position_ids_BS=torch.arange(width).repeat(len(samples), 1),
        padding_mask_BS=torch.arange(width) < lengths_B[:, None],
        cu_seqlens=None,
        max_seqlen=width,
        **_pixels(samples, pixels, shape, apart),
        sample_ids=[sample.id for sample in samples],
        tags=[sample.tag for sample in samples],
        grids=tuple(grid for sample in samples for grid in sample.grids if grid),
        pools=tuple(pool for sample in samples for pool in sample.pools),
        pictures=_pictures(samples),
    )


def _pictures(samples: list[EncodedSample]) -> tuple[tuple[str, int], ...]:
    kinds = [ref.modality.name if ref.modality else PLAIN for sample in samples for ref in sample.images]
    tokens = [count for sample in samples for count in sample.features]
    return tuple(zip(kinds, tokens, strict=True)) if kinds_of(kinds) else ()


def _pixels(samples: list[EncodedSample], pixels: list[np.ndarray], shape, apart: Sequence[str]) -> dict[str, Any]:
    """The fields of a batch that hold its pictures, and `shows_R` where some of them are apart."""
    refs = [ref for sample in samples for ref in sample.images]
    ways = [ref.modality.name if ref.modality and ref.modality.is_apart else SHARED for ref in refs]
    names = [name for name in dict.fromkeys((*apart, *ways)) if name != SHARED]
    if not {*ways} - {SHARED}:
        return {"pixel_values_NCHW": _stack(pixels, shape), "apart": {name: torch.zeros(0, *shape) for name in names}}
    of_way = {way: [part for part, own in zip(pixels, ways, strict=True) if own == way] for way in (SHARED, *names)}
    counts = np.array([count for sample in samples for count in sample.features])
    order = [number for way in of_way for number, own in enumerate(ways) if own == way]  # as they are encoded
    starts = np.zeros(len(order), dtype=np.int64)
    starts[order] = np.cumsum(counts[order]) - counts[order]
    shows_R = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    return {
        "pixel_values_NCHW": _stack(of_way.pop(SHARED), shape),
        "apart": {name: _stack(parts, shape) for name, parts in of_way.items()},
        "shows_R": torch.from_numpy(shows_R),
    }


def _stack(pixels: list[np.ndarray], shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(pixels)) if pixels else torch.zeros(0, *shape)
