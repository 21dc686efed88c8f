"""A batch knows what it holds, as numbers of the host, from the moment it is made and wherever it goes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_moellava.data.batch import Batch, Counts, count, counts_of, from_wire, pack, pad, to_wire, total
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, EncodedSample

SHAPE = (3, 4, 4)
SMALL = (3, 2, 2)


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


# --- rows of samples -----------------------------------------------------------------------------------------------


def numbered(name: str, length: int) -> EncodedSample:
    tokens_S = np.arange(1, length + 1)
    labels_S = np.append(tokens_S[1:], IGNORE_INDEX)
    return EncodedSample(id=name, tag=f"tag {name}", tokens_S=tokens_S, labels_S=labels_S, length=length)


def test_a_packed_row_restarts_positions_in_every_sample_and_in_the_tail():
    batch = pack([numbered("a", 3), numbered("b", 2)], [], 8, 0, SMALL)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8] and batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 1, 2, 0, 0, 0]]
    assert batch.labels_BS.tolist() == [[2, 3, IGNORE_INDEX, 2, IGNORE_INDEX, *[IGNORE_INDEX] * 3]]
    assert batch.padding_mask_BS.tolist() == [[True] * 5 + [False] * 3]
    assert (batch.max_seqlen, batch.sample_ids, batch.tags) == (3, ["a", "b"], ["tag a", "tag b"])


def test_a_full_row_has_no_tail():
    batch = pack([numbered("a", 3), numbered("b", 2)], [], 5, 0, SMALL)
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and bool(batch.padding_mask_BS.all())


def test_padded_rows_are_as_wide_as_the_longest_on_a_multiple():
    batch = pad([numbered("a", 3), numbered("b", 5)], [], 4, 9, SMALL)
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch.padding_mask_BS.sum(dim=1).tolist() == [3, 5]
    assert batch.position_ids_BS.tolist() == [list(range(8))] * 2
    assert (batch.cu_seqlens, batch.max_seqlen) == (None, 8)


def test_pixels_follow_the_order_of_images_and_may_be_none():
    tiles = [np.full((2, *SMALL), 1.0, np.float32), np.full((1, *SMALL), 2.0, np.float32)]
    batch = pack([numbered("a", 3)], tiles, 4, 0, SMALL)
    assert batch.pixel_values_NCHW[:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0]
    assert pack([numbered("a", 3)], [], 4, 0, SMALL).pixel_values_NCHW.shape == (0, *SMALL)


def test_a_batch_comes_back_from_the_wire_as_it_was():
    for batch in (pack([numbered("a", 3)], [], 4, 0, SMALL), pad([numbered("a", 3)], [], 4, 0, SMALL)):
        sent = to_wire(batch)
        assert isinstance(sent.tokens_BS, np.ndarray)
        received = from_wire(sent)
        assert torch.equal(received.tokens_BS, batch.tokens_BS) and received.sample_ids == batch.sample_ids
        assert (received.cu_seqlens is None) == (batch.cu_seqlens is None)


def test_counts_of_modalities_that_are_apart_add_up_by_modality():
    counts = [replace(packed().counts, apart_inputs=apart) for apart in ((1, 0), (2, 5))]
    assert total(counts).apart_inputs == (3, 5) and total(counts).samples == 4
    assert [counts_of(item.numbers()) for item in counts] == counts
