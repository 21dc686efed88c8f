"""The next token of a request: drawn, likeliest, or found by beams."""

import torch

from megatron_moellava.inference.requests import Sampling
from megatron_moellava.inference.sampling import BeamSearch, draw, token_logprobs


def test_top_p_draws_only_from_the_likeliest_tokens_at_their_odds():
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    random = torch.Generator().manual_seed(0)
    drawn = [draw(logits_V, Sampling(temperature=1.0, top_p=0.75), random) for _ in range(2000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 2000 - 0.5 / 0.8) < 0.04  # three standard deviations


def test_logprobs_are_the_models_own_whatever_was_chosen():
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log() + 7.0
    found = token_logprobs(logits_V, token=3, count=2)
    assert (found.token, [token for token, _ in found.top]) == (3, [0, 1])
    assert torch.allclose(torch.tensor([found.logprob, found.top[0][1]]).exp(), torch.tensor([0.05, 0.5]), atol=1e-6)
    assert len(token_logprobs(logits_V, 0, 99).top) == 4 and token_logprobs(logits_V, 0, 0).top == ()


def test_beam_search_finds_the_likelier_sentence_that_greedy_misses():
    """First token: 0 (0.6) or 1 (0.4); after 0 every token is equally likely, after 1 the end (2) is certain."""
    search = BeamSearch(num_beams=2, length_penalty=1.0)
    stop = frozenset({2})
    search.advance(search.propose(torch.tensor([[0.6, 0.4, 1e-9, 1e-9]]).log(), stop), stop)
    assert search.tokens == [[0], [1]]
    after = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1e-9, 1e-9, 1.0, 1e-9]]).log()
    search.advance(search.propose(after, stop), stop, is_last=True)
    assert search.best() == [1, 2]
