"""Numbers of a step that compare the ranks with each other."""

from megatron_moellava.data.batch import Counts
from megatron_moellava.training.metrics import imbalance


def rank(tokens: int, images: int, attended: int) -> Counts:
    return Counts(
        samples=1,
        loss_tokens=1,
        real_tokens=tokens,
        positions=16,
        image_rows=images,
        squared_lengths=1,
        attended=attended,
    )


def test_imbalance_is_the_busiest_rank_over_the_mean():
    found = imbalance([rank(10, 0, 4), rank(10, 6, 12)])
    assert found == {"imbalance/tokens": 1.0, "imbalance/image_tokens": 2.0, "imbalance/attention": 1.5}


def test_no_picture_anywhere_is_even():
    assert imbalance([rank(7, 0, 3)])["imbalance/image_tokens"] == 1.0
