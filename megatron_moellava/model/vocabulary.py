"""Distributions over a vocabulary that is divided among tensor-parallel ranks, seen through a few tokens and the rest.

Teacher and student of a distillation are compared over K tokens and one more outcome, "any other token": C = K + 1 logits
whose softmax are probabilities of the whole vocabulary's softmax. Nothing of it is gathered but these. With K the whole
vocabulary the rest is nothing (-inf), and the comparison that of the full distributions.

Suffixes: T tokens, V vocabulary of this rank, K tokens of interest, C = K + 1.
"""

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


def _first_id(logits_TV: torch.Tensor) -> int:
    """Of this rank: ranks have equal parts of the vocabulary, in order."""
    return parallel_state.get_tensor_model_parallel_rank() * logits_TV.shape[1]


def below(logits_TV: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits in fp32, -inf for ids from `vocab_size` on: rows of the model that no token of the tokenizer stands for."""
    ids_V = torch.arange(logits_TV.shape[1], device=logits_TV.device) + _first_id(logits_TV)
    return logits_TV.float().masked_fill(ids_V >= vocab_size, float("-inf"))


@torch.no_grad()
def top_ids(logits_TV: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [T, K]: the `count` likeliest tokens of the whole vocabulary, the likeliest first. Collective."""
    own = logits_TV.float().topk(min(count, logits_TV.shape[1]), dim=1)
    logits_TR = gather_from_tensor_model_parallel_region(own.values)
    ids_TR = gather_from_tensor_model_parallel_region(own.indices + _first_id(logits_TV))
    return ids_TR.gather(1, logits_TR.topk(count, dim=1).indices)


def logits_of(logits_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """fp32 [T, K]: the logits of these tokens, wherever they are. Collective; gradients go back to where they came from."""
    places_TK = ids_TK - _first_id(logits_TV)
    is_elsewhere_TK = (places_TK < 0) | (places_TK >= logits_TV.shape[1])
    rows_T1 = torch.arange(len(logits_TV), device=logits_TV.device)[:, None]
    # Not gather(), which keeps the logits for its backward pass.
    found_TK = logits_TV[rows_T1, places_TK.masked_fill(is_elsewhere_TK, 0)].float()
    return reduce_from_tensor_model_parallel_region(found_TK.masked_fill(is_elsewhere_TK, 0.0))


def rest_of(logits_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """fp32 [T]: log-sum-exp of the logits of all other tokens, -inf where there are none. Collective.

    Of these tokens themselves, not of what the K leave of 1: that would be rounding where they have nearly all.
    """
    places_TK = ids_TK - _first_id(logits_TV)
    is_elsewhere_TK = (places_TK < 0) | (places_TK >= logits_TV.shape[1])
    # An additional column takes what is elsewhere.
    is_named_TV = torch.zeros(len(logits_TV), logits_TV.shape[1] + 1, dtype=torch.bool, device=logits_TV.device)
    is_named_TV.scatter_(1, places_TK.masked_fill(is_elsewhere_TK, logits_TV.shape[1]), True)
    others_TV = logits_TV.float().masked_fill(is_named_TV[:, :-1], float("-inf"))
    largest_T = others_TV.detach().amax(dim=1)
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    largest_T = largest_T.masked_fill(largest_T.isinf(), 0.0)
    probs_TV = others_TV.sub_(largest_T[:, None]).exp_()  # in place: nothing is as large as this
    sum_T = reduce_from_tensor_model_parallel_region(probs_TV.sum(dim=1))
    is_nothing_T = sum_T == 0
    return (sum_T.masked_fill(is_nothing_T, 1.0).log() + largest_T).masked_fill(is_nothing_T, float("-inf"))


def with_rest(logits_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """fp32 [T, C]: logits of these tokens, and of any other one together. Collective.

    >>> logits [0, log 2, log 3, log 4], ids [3, 1] -> [log 4, log 2, log 4]
    """
    return torch.cat([logits_of(logits_TV, ids_TK), rest_of(logits_TV, ids_TK)[:, None]], dim=1)
