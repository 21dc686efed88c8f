"""The two answers of a pair as tokens, and packed rows of pairs.

Both follow the same prompt about the same pictures: a picture is read and encoded once, and shown to both. The prompt's
tokens stand before each answer, so that every attention kernel can read such a row.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_moellava.data.batch import Batch, pack
from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.sample import BadSample, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPair:
    """Both answers with their prompt as tokens; as long as the two together. Labels are those of the answers alone."""

    chosen: EncodedSample
    rejected: EncodedSample

    @property
    def images(self):
        """Of the prompt, each once."""
        return self.chosen.images

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def encode_pair(
    encoder: Encoder, pair: tuple[Sample, Sample], features: tuple[int, ...], seq_length: int
) -> EncodedPair:
    """Raises BadSample where the two answers do not fit into a row: cut ones would be compared by what is left of them."""
    whole = replace(encoder, long_samples="skip")
    chosen, rejected = (_last_answer(whole(sample, features)) for sample in pair)
    if (chosen.labels_S.shape == rejected.labels_S.shape) and (chosen.tokens_S == rejected.tokens_S).all():
        raise BadSample(
            "pair without a difference",
            f"{pair[0].origin}: chosen and rejected are the same tokens; remove the row",
        )
    encoded = EncodedPair(chosen=chosen, rejected=rejected)
    if len(encoded) > seq_length:
        raise BadSample(
            "too long",
            f"{pair[0].origin}: {len(encoded)} tokens of both answers, each with its prompt and pictures, more than "
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
) -> Batch:
    """One row of exactly seq_length. `pixels`: [T, 3, H, W] of each picture of each pair, once; `reference_R2`: of all rows.

    >>> two pairs with one picture each -> shows_M [0 0 1 1]: their answers' segments show pictures 0, 0, 1 and 1
    """
    batch = pack(
        [answer for pair in pairs for answer in (pair.chosen, pair.rejected)], pixels, seq_length, pad_id, shape
    )
    tiles, shows, picture = [len(tile) for tile in pixels], [], 0
    for pair in pairs:
        first = sum(tiles[:picture])
        picture += len(pair.images)
        shows += 2 * [*range(first, sum(tiles[:picture]))]
    return replace(
        batch,
        sample_ids=batch.sample_ids[::2],
        pairs=numbers,
        reference_P2=None if reference_R2 is None else torch.from_numpy(reference_R2[numbers].astype(np.float32)),
        shows_M=torch.tensor(shows, dtype=torch.int64),
        counts=None,  # anew, with what is known now
    )
