"""A batch knows what it holds, as numbers of the host, from the moment it is made and wherever it goes."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_moellava.data.batch import Batch, Counts, count, from_wire, pack, pad, to_wire, total
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, EncodedSample

SHAPE = (3, 4, 4)


def sample(length: int, image_rows: int = 0, labels: int = 1) -> EncodedSample:
    tokens_S = np.arange(1, length + 1)
    tokens_S[:image_rows] = IMAGE_TOKEN
    labels_S = np.full(length, IGNORE_INDEX)
    labels_S[length - labels :] = 7
    return EncodedSample(id=f"of {length}", tokens_S=tokens_S, labels_S=labels_S, images=(), tag="")


def packed() -> Batch:
    return pack([sample(3, image_rows=2), sample(2, labels=2)], [], 8, 0, SHAPE)


def padded() -> Batch:
    return pad([sample(4, image_rows=1), sample(2)], [], 4, 0, SHAPE)


def test_counts_of_a_packed_row_leave_its_pad_tail_out():
    assert packed().counts == Counts(
        samples=2, loss_tokens=3, real_tokens=5, positions=8, image_rows=2, squared_lengths=9 + 4, attended=9 + 4 + 9
    )


def test_a_full_packed_row_has_no_tail_to_leave_out():
    counts = pack([sample(5), sample(3)], [], 8, 0, SHAPE).counts
    assert counts.squared_lengths == counts.attended == 25 + 9
    assert counts.real_tokens == counts.positions == 8


def test_counts_of_padded_rows():
    assert padded().counts == Counts(
        samples=2, loss_tokens=2, real_tokens=6, positions=8, image_rows=1, squared_lengths=16 + 4, attended=16 + 16
    )


@pytest.mark.parametrize("made", [packed, padded])
def test_counts_travel_and_are_not_taken_again(made):
    """Behind a worker's connection, and on a device, nobody looks at the tensors to know them."""
    batch = made()
    arrived = from_wire(to_wire(batch))
    assert arrived.counts is batch.counts and count(arrived) == batch.counts
    moved = replace(batch, tokens_BS=batch.tokens_BS.to("meta"), labels_BS=batch.labels_BS.to("meta"))
    assert moved.counts is batch.counts


def test_counts_of_several_batches_add_up():
    both = total([packed().counts, padded().counts])
    assert both.samples == 4 and both.real_tokens == 11 and both.attended == 22 + 32
