"""Megatron-Core's top-k router that knows which tokens are of an image.

Two things, each of use without the other:

* Groups of experts (`moe.expert_groups`): a token chooses among the experts of its modality and the shared ones (MoIIE's
  division). The others' logits are -inf before anything is made of them, so that they have no probability, no part in a
  loss, and no place; or, with a penalty, lower by a constant: a soft form of our own reading of SMoES (arXiv 2604.23996), of
  which no public code was compared.
* Balance of each modality on its own (`moe.balance_per_modality`): the balancing loss is computed over image tokens and over
  text tokens, each with the number of experts that they can choose among, and added up with their shares of the tokens. It
  is 1 where each modality is spread evenly.

What a layer gives the router beside the hidden states are marks [S, B, 2]: is padding, is of an image. They travel as
Megatron-Core's padding mask, which reaches every layer under every layout and is kept for recomputation.

Shapes: S positions of this rank, B rows, N = S * B tokens, E experts, K choices of a token; 2: text, image.
"""

import math

import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.router import MegatronRouter, Part
from megatron_moellava.routers import admissible_experts, own_experts


def marks_of(padding_BS: torch.Tensor | None, is_image_BS: torch.Tensor) -> torch.Tensor:
    """[B, S, 2] (bool) of this rank's tokens. `padding_BS`: True = padding; None: there is none."""
    padding_BS = torch.zeros_like(is_image_BS) if padding_BS is None else padding_BS
    return torch.stack([padding_BS, is_image_BS], dim=-1)


class ModalityRouter(MegatronRouter):
    """`MegatronRouter` that takes marks for its padding mask."""

    own_2E: torch.Tensor  # bool: of text and of image tokens, the experts of their modality and the shared ones
    admissible_2E: torch.Tensor  # bool: likewise, those that they can choose at all

    def __init__(self, *arguments, moe: MoEConfig, **options):
        super().__init__(*arguments, **options)
        self.balances_apart, self.groups = moe.balance_per_modality, moe.expert_groups
        self.admissible = admissible_experts(moe)  # of text and of image tokens
        for name, experts in (("own_2E", own_experts(moe)), ("admissible_2E", self.admissible)):
            table_2E = torch.tensor([[e in mine for e in range(moe.num_moe_experts)] for mine in experts])
            self.register_buffer(name, table_2E, persistent=False)
        self.is_image_SB: torch.Tensor | None = None  # of the call that is under way

    def routing(self, logits_SBE: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Returns weights [N, E] and map [N, E] (bool). `padding_mask`: marks [S, B, 2]."""
        assert padding_mask is not None, "the layer has to say which tokens are of an image"
        self.is_image_SB = padding_mask[..., 1]
        return super().routing(self.judged(logits_SBE, padding_mask), padding_mask[..., 0])

    def judged(self, logits_SBE: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
        """Other modalities' experts have logits of -inf, or lower ones."""
        if self.groups is None or marks is None:
            return logits_SBE
        others_SBE = ~self.own_2E[marks[..., 1].long()]
        if self.groups.penalty is None:
            return logits_SBE.masked_fill(others_SBE, -math.inf)
        return logits_SBE - self.groups.penalty * others_SBE

    def _choice_bias(self, logits_NE: torch.Tensor) -> torch.Tensor | None:
        """A bias cannot bring back an expert that a token may not choose."""
        if self.expert_bias is None:
            return None
        return self.expert_bias.masked_fill(logits_NE.isneginf(), -math.inf)

    def _fair_load(self, asked_NE: torch.Tensor) -> torch.Tensor:
        """[E]: each modality's tokens * K, spread evenly over the experts that they can choose among.

        8 image and 4 text tokens, K=1, experts image 0 and 1, shared 2, text 3: [8/3, 8/3, 8/3 + 2, 2]. Rounding in fp64 must
        not look like a fraction of a choice.
        """
        assert self.is_image_SB is not None
        is_real_N, is_image_N = asked_NE.any(dim=1), self.is_image_SB.flatten()
        images = (is_real_N & is_image_N).sum()
        tokens_2 = torch.stack([is_real_N.sum() - images, images]).double()
        chooses_2 = self.admissible_2E.sum(dim=1).double()
        fair_E = ((tokens_2 * self.topk / chooses_2)[:, None] * self.admissible_2E).sum(dim=0)
        return (fair_E * 2**24).round() / 2**24

    def _load(self, asked_NE: torch.Tensor) -> torch.Tensor:
        """[E]: what an expert gets beyond its fair load, so that a modality with many tokens does not overload its experts
        for ever. Sums to 0, which is the mean that Megatron-Core compares with."""
        return asked_NE.sum(dim=0) - self._fair_load(asked_NE)

    def balanced_parts(self, scores_SBE: torch.Tensor, asked_SBE: torch.Tensor) -> list[Part]:
        if not self.balances_apart:
            return super().balanced_parts(scores_SBE, asked_SBE)
        assert self.is_image_SB is not None
        members = (~self.is_image_SB[..., None], self.is_image_SB[..., None])
        return [
            Part(asked_SBE * is_member_SB1, scores_SBE * is_member_SB1, len(experts))
            for is_member_SB1, experts in zip(members, self.admissible, strict=True)
        ]
