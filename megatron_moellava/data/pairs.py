"""The two answers of a pair as tokens, and packed rows of pairs.

Both follow the same prompt about the same pictures: a picture is read and encoded once, and shown to both. The prompt's
tokens stand before each answer, so that every attention kernel can read such a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_moellava.data.batch import Batch, pack
from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample
from megatron_moellava.data.pooling import Pools
from megatron_moellava.data.sample import BadSample


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPair:
    """Both answers with their prompt as tokens; as long as the two together. Labels are those of the answers alone."""

    chosen: EncodedSample
    rejected: EncodedSample

    @property
    def grids(self) -> tuple[tuple[int, ...], ...]:
        """Of the pictures, which both answers share."""
        return self.chosen.grids

    @property
    def pools(self) -> Pools:
        """Of the frames of videos, likewise."""
        return self.chosen.pools

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def pair_of(chosen: EncodedSample, rejected: EncodedSample, *, origin: str, seq_length: int) -> EncodedPair:
    """Raises BadSample where the two answers are the same tokens, or do not fit into a row together."""
    chosen, rejected = _last_answer(chosen), _last_answer(rejected)
    if np.array_equal(chosen.tokens_S, rejected.tokens_S):
        raise BadSample(
            "pair without a difference", f"{origin}: chosen and rejected are the same tokens; remove the row"
        )
    encoded = EncodedPair(chosen=chosen, rejected=rejected)
    if len(encoded) > seq_length:
        raise BadSample(
            "too long",
            f"{origin}: {len(encoded)} tokens of both answers, each with its prompt and pictures, more than "
            f"data.seq_length={seq_length}; shorten the row, or raise data.seq_length",
        )
    return encoded


def _last_answer(sample: EncodedSample) -> EncodedSample:
    """Labels of the last answer alone: those before it belong to the prompt."""
    trained = np.flatnonzero(sample.labels_S != IGNORE_INDEX)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    labels_S = sample.labels_S.copy()
    if len(breaks):
        labels_S[: trained[breaks[-1] + 1]] = IGNORE_INDEX
    return replace(sample, labels_S=labels_S)


def pack_pairs(
    pairs: list[EncodedPair],
    numbers: list[int],
    pixels: list[np.ndarray],
    reference_R2: np.ndarray | None,
    *,
    seq_length: int,
    pad_id: int,
    shape: tuple[int, int, int],
    apart: Sequence[str] = (),
) -> Batch:
    """One row of exactly seq_length. `pixels`: of each picture of each pair, once; `reference_R2`: of all rows.

    >>> two pairs with one picture of two tokens each -> shows_R [0 1 0 1 2 3 2 3]
    """
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    shown = [pair.chosen for pair in pairs]
    batch = pack(answers, pixels, seq_length, pad_id, shape, apart, shown)
    shows, first = [], 0
    for pair in pairs:
        tokens = sum(pair.chosen.features)
        shows += 2 * [*range(first, first + tokens)]
        first += tokens
    shows_R = torch.tensor(shows, dtype=torch.int64)
    return replace(
        batch,
        sample_ids=batch.sample_ids[::2],
        grids=tuple(grid for pair in pairs for grid in pair.grids if grid),
        pools=tuple(pool for pair in pairs for pool in pair.chosen.pools),
        pairs=numbers,
        reference_P2=None if reference_R2 is None else torch.from_numpy(reference_R2[numbers].astype(np.float32)),
        shows_R=shows_R if batch.shows_R is None else batch.shows_R[shows_R],
        counts=None,  # type: ignore[arg-type]  # anew, with what is known now
    )
