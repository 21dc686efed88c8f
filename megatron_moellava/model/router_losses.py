"""The losses that keep a router balanced and its logits small, whole whatever ranks the tokens are spread over.

Megatron-Core 0.19.2 has them too (transformer/moe/router.py), but three depend on the layout or on padding:

* `seq_aux_loss` divides the counts of every row by the mean length of the rows, so rows of different lengths count wrongly;
* `global_aux_loss` divides counts accumulated over micro-batches by the tokens of the present one, and its gradient is
  averaged over data-parallel ranks though every rank has only its own tokens' share of it (Megatron-LM #3769);
* the z-loss averages the means of the ranks that share a row, though one may hold more padding than another.

So all are computed here. Each function returns this rank's share: the shares of the ranks that split a row (tensor, context)
add up to the loss of the micro-batch, and what is trained and logged is its mean over micro-batches and data-parallel ranks.

Shapes: S positions of this rank, B rows, N = S * B tokens, E experts, K choices of a token; R rows that are judged each on
its own (1: all tokens together).
"""

import torch
import torch.distributed as dist

from megatron.core.transformer.moe.moe_utils import z_loss_func


def reduced(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks of a group, without a gradient."""
    if group.size() == 1:  # gloo would hand the numbers to a thread of its own
        return counts.detach()
    counts = counts.detach().clone()
    dist.all_reduce(counts, group=group)
    return counts


def switch_loss(
    scores_RE: torch.Tensor,
    tokens_R: torch.Tensor,
    counts_RE: torch.Tensor,
    topk: int,
    coefficient: float,
    experts: int | None = None,
) -> torch.Tensor:
    """coefficient * mean over rows of E * sum_e(share of the choices * mean probability): 1 when balanced, E when all go to
    one expert (Switch Transformer, arXiv 2101.03961).

    `scores`: sums of probabilities over this rank's real tokens; `tokens`: how many real tokens all ranks that share a row
    have; `counts`: choices of all tokens that the balance is judged by, before any is dropped. `experts`: E, where the tokens
    can choose among fewer than there are. Scores and counts of a part of a row's tokens give that part's loss times its share
    of the tokens, so that the parts' results add up to the mean over tokens.
    """
    counted_R = counts_RE.sum(dim=-1) / topk
    experts = experts or counts_RE.shape[-1]
    factor_R = experts * coefficient / (topk * tokens_R.clamp(min=1) * counted_R.clamp(min=1))
    return ((scores_RE * counts_RE).sum(dim=-1) * factor_R).mean()


def z_loss(
    logits_NE: torch.Tensor, padding_N: torch.Tensor | None, group: dist.ProcessGroup, coefficient: float
) -> torch.Tensor:
    """coefficient * mean over real tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), in fp32. `group`: shares the
    rows."""
    loss = z_loss_func(logits_NE.float(), coefficient, padding_N)
    if group.size() == 1:
        return loss
    here = torch.tensor(len(logits_NE), device=loss.device) if padding_N is None else (~padding_N).sum()
    return loss * (here / reduced(here, group).clamp(min=1))
