"""Losses and likeliest tokens from logits, beside torch's own on whole rows; shares of rows are in tests/distributed."""

import pytest
import torch
import torch.nn.functional as F

from megatron_moellava import parallel
from megatron_moellava.config import ParallelConfig
from megatron_moellava.data.encode import IGNORE_INDEX as X
from megatron_moellava.model.answers import token_losses


@pytest.fixture(scope="module", autouse=True)
def one_process():
    parallel.initialize(ParallelConfig(), 1)
    yield
    parallel.shutdown()


def test_losses_are_those_of_the_labels_and_zero_elsewhere():
    labels_BS = torch.tensor([[X, 3, 1], [2, X, X]])
    logits_BSV = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    losses_BS, guesses_BS = token_losses(labels_BS, logits_BSV, 5)
    expected = F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, ignore_index=X, reduction="none")
    assert torch.allclose(losses_BS, expected) and losses_BS[labels_BS == X].eq(0).all()
    assert torch.equal(guesses_BS, logits_BSV.argmax(-1))


def test_a_row_that_no_token_stands_for_is_never_the_guess():
    """It still has its share of the probability, as in training."""
    logits_BSV = torch.tensor([[[0.0, 1.0, 5.0]]])
    losses_BS, guesses_BS = token_losses(torch.tensor([[1]]), logits_BSV, 2)
    assert guesses_BS.tolist() == [[1]]
    assert losses_BS.item() == pytest.approx(F.cross_entropy(logits_BSV[0], torch.tensor([1])).item())
