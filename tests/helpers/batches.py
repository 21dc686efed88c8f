"""Small batches of known tokens."""

import itertools

import torch

from megatron_moellava.data.batch import Batch

X = -100  # a label without loss


def padded(tokens: list[list[int]], labels: list[list[int]], tags: list[str], **more) -> Batch:
    tokens_BS = torch.tensor(tokens)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=torch.tensor(labels),
        position_ids_BS=torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS),
        padding_mask_BS=tokens_BS != 0,
        cu_seqlens=more.get("cu_seqlens"),
        max_seqlen=tokens_BS.shape[1],
        pixel_values_NCHW=torch.zeros(0, 3, 72, 72),
        sample_ids=[],
        tags=tags,
    )


def words(rows: int = 2, length: int = 12) -> Batch:
    tokens = torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(3))
    tokens[-1, length - 3 :] = 0
    labels = torch.where(tokens > 200, tokens, X)
    return padded(tokens.tolist(), labels.tolist(), ["color", "shape"][:rows])


class Repeated:
    """Batches made by hand, over and over, where a trainer expects its loader. There is no position to come back to."""

    num_bad = 0

    def __init__(self, batches: list[Batch]):
        self.batches = itertools.cycle(batches)

    def __next__(self) -> Batch:
        return next(self.batches)

    def state_dict(self) -> dict:
        return {}

    def check_skipped(self, bad_rows: int) -> None:
        assert bad_rows == 0
