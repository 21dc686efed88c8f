"""Rows of samples, packed and padded."""

import numpy as np
import torch

from megatron_moellava.data.batch import from_wire, pack, pad, to_wire
from megatron_moellava.data.encode import IGNORE_INDEX, EncodedSample

SHAPE = (3, 2, 2)


def sample(name: str, length: int) -> EncodedSample:
    tokens_S = np.arange(1, length + 1)
    labels_S = np.append(tokens_S[1:], IGNORE_INDEX)
    return EncodedSample(id=name, tag=f"tag {name}", tokens_S=tokens_S, labels_S=labels_S, length=length)


def test_a_packed_row_restarts_positions_in_every_sample_and_in_the_tail():
    batch = pack([sample("a", 3), sample("b", 2)], [], 8, 0, SHAPE)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8] and batch.cu_seqlens.dtype == torch.int32
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 1, 2, 0, 0, 0]]
    assert batch.labels_BS.tolist() == [[2, 3, IGNORE_INDEX, 2, IGNORE_INDEX, *[IGNORE_INDEX] * 3]]
    assert batch.padding_mask_BS.tolist() == [[True] * 5 + [False] * 3]
    assert (batch.max_seqlen, batch.sample_ids, batch.tags) == (3, ["a", "b"], ["tag a", "tag b"])


def test_a_full_row_has_no_tail():
    batch = pack([sample("a", 3), sample("b", 2)], [], 5, 0, SHAPE)
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and bool(batch.padding_mask_BS.all())


def test_padded_rows_are_as_wide_as_the_longest_on_a_multiple():
    batch = pad([sample("a", 3), sample("b", 5)], [], 4, 9, SHAPE)
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch.padding_mask_BS.sum(dim=1).tolist() == [3, 5]
    assert batch.position_ids_BS.tolist() == [list(range(8))] * 2
    assert (batch.cu_seqlens, batch.max_seqlen) == (None, 8)


def test_pixels_follow_the_order_of_images_and_may_be_none():
    tiles = [np.full((2, *SHAPE), 1.0, np.float32), np.full((1, *SHAPE), 2.0, np.float32)]
    batch = pack([sample("a", 3)], tiles, 4, 0, SHAPE)
    assert batch.pixel_values_NCHW[:, 0, 0, 0].tolist() == [1.0, 1.0, 2.0]
    assert pack([sample("a", 3)], [], 4, 0, SHAPE).pixel_values_NCHW.shape == (0, *SHAPE)


def test_a_batch_comes_back_from_the_wire_as_it_was():
    for batch in (pack([sample("a", 3)], [], 4, 0, SHAPE), pad([sample("a", 3)], [], 4, 0, SHAPE)):
        sent = to_wire(batch)
        assert isinstance(sent.tokens_BS, np.ndarray)
        received = from_wire(sent)
        assert torch.equal(received.tokens_BS, batch.tokens_BS) and received.sample_ids == batch.sample_ids
        assert (received.cu_seqlens is None) == (batch.cu_seqlens is None)
