"""A few tokens and the rest, in one process; divided vocabularies are in tests/distributed/test_distillation.py."""

import math

import pytest
import torch

from megatron_moellava.model.vocabulary import below, logits_of, rest_of, top_ids, with_rest
from tests.helpers.trainers import one_layout


@pytest.fixture(scope="module", autouse=True)
def groups():
    with one_layout():
        yield


def drawn(tokens: int = 5, vocabulary: int = 11) -> torch.Tensor:
    return (3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(1))).requires_grad_()


def test_a_few_tokens_and_the_rest():
    found = with_rest(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log(), torch.tensor([[3, 1]]))
    assert found.exp().tolist() == [pytest.approx([4.0, 2.0, 4.0])]


@pytest.mark.parametrize("count", [1, 3, 10])
def test_probabilities_are_those_of_the_whole_vocabulary(count):
    logits_TV = drawn()
    ids_TK = top_ids(logits_TV, count)
    probs_TC = with_rest(logits_TV, ids_TK).softmax(dim=1)
    whole_TV = logits_TV.softmax(dim=1)
    torch.testing.assert_close(probs_TC[:, :-1], whole_TV.topk(count, dim=1).values)
    torch.testing.assert_close(probs_TC[:, -1], 1 - whole_TV.gather(1, ids_TK).sum(dim=1), atol=1e-6, rtol=1e-4)


def test_the_whole_vocabulary_leaves_no_rest():
    logits_TV = drawn()
    ids_TV = top_ids(logits_TV, 11)
    assert (rest_of(logits_TV, ids_TV) == -math.inf).all()
    with_rest(logits_TV, ids_TV).logsumexp(dim=1).sum().backward()
    torch.testing.assert_close(logits_TV.grad, logits_TV.detach().softmax(dim=1), msg="finite, and right")


def test_a_rest_that_is_nearly_nothing_is_not_rounded_away():
    """1 - p of a token that is 2^30 times as likely as the others together is 0 in fp32."""
    logits_TV = torch.tensor([[40.0, 0.0, 0.0]])
    assert float(rest_of(logits_TV, torch.tensor([[0]]))) == pytest.approx(math.log(2.0))


def test_gradients_of_the_rest_are_a_softmax_over_it():
    logits_TV = drawn()
    ids_TK = top_ids(logits_TV, 3)
    rest_of(logits_TV, ids_TK).sum().backward()
    others_TV = logits_TV.detach().scatter(1, ids_TK, -math.inf)
    torch.testing.assert_close(logits_TV.grad, others_TV.softmax(dim=1))


def test_a_token_that_is_asked_for_twice_counts_once_in_the_rest():
    logits_TV = drawn(1)
    twice, once = torch.tensor([[4, 4]]), torch.tensor([[4]])
    assert torch.equal(rest_of(logits_TV, twice), rest_of(logits_TV, once))
    assert torch.equal(logits_of(logits_TV, twice)[0], logits_TV[0, [4, 4]])


def test_rows_that_stand_for_no_token_are_never_likely():
    logits_TV = below(drawn(), 7)
    assert (logits_TV[:, 7:] == -math.inf).all() and logits_TV[:, :7].isfinite().all()
    assert int(top_ids(logits_TV, 7).max()) == 6


def test_no_token_at_all():
    empty_TV = torch.zeros(0, 11, requires_grad=True)
    found = with_rest(empty_TV, torch.zeros(0, 3, dtype=torch.int64))
    assert found.shape == (0, 4) and top_ids(empty_TV, 3).shape == (0, 3)
    found.sum().backward()
