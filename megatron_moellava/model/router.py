"""Where a token chooses its experts: Megatron-Core's router, and the original's gate behind the same interface.

Shapes: S sequence (of this rank), B batch, H hidden, E experts, N = S * B tokens. Megatron-Core flattens [S, B] sequence
first; the original counts places batch first, over the whole sequence, so `OriginalRouter` gathers and transposes.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig
from megatron_moellava.model.original_gate import Draw, OriginalGate, no_noise
from megatron_moellava.model.router_losses import reduced, switch_loss, z_loss

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    group_limited_topk,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens whose balance is judged apart from the others'; both tensors are 0 for the others and for padding."""

    asked_SBE: torch.Tensor  # what they ask for, before any is dropped
    scores_SBE: torch.Tensor  # their probabilities, fp32
    experts: int  # that they can choose among


class MegatronRouter(TopKRouter):
    """Megatron-Core's top-k router without a bias, with fp32 weights that start as torch's Linear does.

    Megatron-Core adds a bias to the router of every model whose MLPs have one (Phi-2); the original has none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        normalizes_top1: bool = False,
    ):
        unbiased = copy.copy(config)
        unbiased.add_bias_linear = False
        unbiased.params_dtype = torch.float32
        unbiased.init_method = uniform_router_init
        super().__init__(config=unbiased, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.normalizes_top1 = normalizes_top1
        self.losses: dict[
            str, torch.Tensor
        ] = {}  # sums over the micro-batches of a step; `training/metrics.py` takes them
        self.counts_of_step_P1E: torch.Tensor | int = 0  # choices of all ranks, of each part, for global_aux_loss

    def gating(self, input_SBH: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, E], in fp32 unless `moe_router_dtype` leaves them in the dtype of the hidden states.

        Megatron-Core's hands bf16 states and fp32 weights to one product where Transformer Engine is installed, which
        cuBLASLt refuses (te_general_gemm in moe_utils.py), and which for fp32 uses TF32.
        """
        dtype = torch.float32 if self.config.moe_router_dtype == "fp32" else input_SBH.dtype
        return RouterProduct.apply(input_SBH, self.weight, dtype)

    def judged(self, logits_SBE: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
        """The logits that the choice is made of. `marks`: what the layer gave the router beside the hidden states."""
        return logits_SBE

    def probabilities(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """[N, E] over all experts (fp32), before any choice."""
        logits_NE = logits_NE.float()
        if self.score_function == "softmax":
            return logits_NE.softmax(dim=-1)
        scores_NE = logits_NE.sigmoid()
        return scores_NE / scores_NE.sum(dim=-1, keepdim=True)

    def choices(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """[N, K], the experts that each token asks for, before any capacity is looked at."""
        scores_NE = logits_NE
        bias = self._choice_bias(logits_NE)
        if bias is not None:
            scores_NE = logits_NE.float().sigmoid() + bias
        elif self.config.moe_router_group_topk:  # groups are compared by sums of scores
            scores_NE = logits_NE.float().softmax(dim=-1)
        if self.config.moe_router_group_topk:
            return group_limited_topk(
                scores_NE,
                self.topk,
                *scores_NE.shape,
                num_groups=self.config.moe_router_num_groups,
                group_topk=self.config.moe_router_group_topk,
            )[1]
        return scores_NE.topk(self.topk, dim=-1).indices

    def routing(self, logits_SBE: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Returns weights [N, E] and map [N, E] (bool). `padding_mask` [S, B]: True where a token is padding.

        Megatron-Core's, but that padding takes no place at an expert and makes none, whose capacity is of the real tokens;
        that the losses are those of `router_losses.py`; and that a bias balances what tokens ask for, not what is left of
        it after dropping.
        """
        logits_NE = logits_SBE.view(-1, self.config.num_moe_experts)
        padding_N = None if padding_mask is None else padding_mask.reshape(-1)
        is_training = self.training and torch.is_grad_enabled()  # not in the first pass over what is recomputed later
        if is_training and self.config.moe_z_loss_coeff:
            logits_NE = self._with_z_loss(logits_NE, padding_N)
        weights_NE, map_NE = topk_routing_with_score_function(
            logits_NE,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self._choice_bias(logits_NE),
        )
        if self.normalizes_top1:
            weights_NE = weights_NE / weights_NE.sum(dim=-1, keepdim=True).detach()
        asked_NE = map_NE if padding_N is None else map_NE & ~padding_N.unsqueeze(-1)
        if self.config.moe_expert_capacity_factor is not None:
            fair = self._fair_load(asked_NE)
            map_NE = within_capacity(weights_NE, asked_NE, fair, self.config.moe_expert_capacity_factor)
            weights_NE = weights_NE * map_NE
        if is_training and self.routing_type != "none":
            weights_NE = self._with_balancing_loss(
                weights_NE, logits_NE, padding_N, (logits_SBE.shape[0], logits_SBE.shape[1])
            )
        if is_training and self.enable_expert_bias:
            self.local_tokens_per_expert += self._load(asked_NE)
        return weights_NE, map_NE

    def _choice_bias(self, logits_NE: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores for the choice alone: [E], or [N, E]."""
        return self.expert_bias

    def _fair_load(self, asked_NE: torch.Tensor) -> torch.Tensor:
        """Choices that each expert would get if all that may be chosen got as many (fp64): a number, or [E]."""
        return asked_NE.any(dim=1).sum().double() * self.topk / asked_NE.shape[1]

    def _load(self, asked_NE: torch.Tensor) -> torch.Tensor:
        """[E], what an expert bias balances: an expert with more than the mean gets a lower one."""
        return asked_NE.sum(dim=0)

    def balanced_parts(self, scores_SBE: torch.Tensor, asked_SBE: torch.Tensor) -> list[Part]:
        """Whose balancing losses are computed apart, and added up with their shares of the tokens."""
        return [Part(asked_SBE, scores_SBE, asked_SBE.shape[-1])]

    def _with_z_loss(self, logits_NE: torch.Tensor, padding_N: torch.Tensor | None) -> torch.Tensor:
        coefficient = self.config.moe_z_loss_coeff
        loss = z_loss(logits_NE, padding_N, self.tp_cp_group, coefficient)
        self._record("z_loss", loss / coefficient)
        return MoEAuxLossAutoScaler.apply(logits_NE, loss)

    def _with_balancing_loss(
        self, weights_NE: torch.Tensor, logits_NE: torch.Tensor, padding_N: torch.Tensor | None, shape: tuple[int, int]
    ) -> torch.Tensor:
        """`weights` with coefficient * loss in their graph. With a coefficient of 0 the loss is only recorded."""
        asked_NE, scores_NE = compute_routing_scores_for_aux_loss(
            logits_NE, self.topk, self.score_function, padding_mask=padding_N
        )
        coefficient = self.config.moe_aux_loss_coeff
        asked_SBE, scores_SBE = (item_NE.view(*shape, -1) for item_NE in (asked_NE, scores_NE))
        loss = BALANCING[self.routing_type](self, self.balanced_parts(scores_SBE, asked_SBE), coefficient or 1.0)
        self._record("load_balancing_loss", loss / (coefficient or 1.0))
        return MoEAuxLossAutoScaler.apply(weights_NE, loss) if coefficient else weights_NE

    def _aux_loss(self, parts: list[Part], coefficient: float) -> torch.Tensor:
        """Of all tokens of the micro-batch together."""
        counts_P1E = reduced(torch.stack([part.asked_SBE.sum(dim=(0, 1))[None] for part in parts]), self.tp_cp_group)
        scores = [part.scores_SBE.sum(dim=(0, 1))[None] for part in parts]
        return self._sum_of_parts(parts, scores, counts_P1E, counts_P1E, coefficient)

    def _seq_aux_loss(self, parts: list[Part], coefficient: float) -> torch.Tensor:
        """Of each row on its own (a packed row is one), then their mean."""
        counts_PBE = reduced(torch.stack([part.asked_SBE.sum(dim=0) for part in parts]), self.tp_cp_group)
        scores = [part.scores_SBE.sum(dim=0) for part in parts]
        return self._sum_of_parts(parts, scores, counts_PBE, counts_PBE, coefficient)

    def _global_aux_loss(self, parts: list[Part], coefficient: float) -> torch.Tensor:
        """The probabilities of this micro-batch's tokens on all ranks against the choices of all ranks so far in the step
        (arXiv 2501.11873)."""
        counts_P1E = torch.stack([part.asked_SBE.sum(dim=(0, 1))[None] for part in parts])
        counts_P1E = reduced(counts_P1E, self.tp_dp_cp_group)
        self.counts_of_step_P1E = self.counts_of_step_P1E + counts_P1E
        # The mean over data-parallel ranks is taken of shares that add up to the loss.
        coefficient *= self.tp_dp_cp_group.size() // self.tp_cp_group.size()
        scores = [part.scores_SBE.sum(dim=(0, 1))[None] for part in parts]
        return self._sum_of_parts(parts, scores, counts_P1E, self.counts_of_step_P1E, coefficient)

    def _sum_of_parts(
        self,
        parts: list[Part],
        scores_RE: list[torch.Tensor],
        counts_PRE: torch.Tensor,
        judged_by_PRE: torch.Tensor,
        coefficient: float,
    ) -> torch.Tensor:
        """Of rows R: each part's loss times its share of the row's tokens."""
        tokens_R = counts_PRE.sum(dim=(0, 2)) / self.topk
        losses = [
            switch_loss(scores, tokens_R, judged_by_RE, self.topk, coefficient, part.experts)
            for part, scores, judged_by_RE in zip(parts, scores_RE, judged_by_PRE, strict=True)
        ]
        return sum(losses[1:], start=losses[0])

    def reset_global_aux_loss_tracker(self) -> None:
        """Megatron-Core calls it at the end of every step."""
        super().reset_global_aux_loss_tracker()
        self.counts_of_step_P1E = 0

    def _record(self, name: str, share: torch.Tensor) -> None:
        """Add this rank's share of a loss, before its coefficient, to what a step will log."""
        self.losses[name] = self.losses.get(name, 0.0) + share.detach()


class RouterProduct(torch.autograd.Function):
    """input [..., H] x weight [E, H] -> [..., E] in a dtype of its own; the backward pass keeps no second copy of the input."""

    @staticmethod
    def forward(ctx, input_SBH: torch.Tensor, weight_EH: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[S, B, H] x [E, H] -> [S, B, E] in `dtype`."""
        ctx.save_for_backward(input_SBH, weight_EH)
        return F.linear(input_SBH.to(dtype), weight_EH.to(dtype))

    @staticmethod
    def backward(ctx, grad_SBE: torch.Tensor):
        """Gradients of input [S, B, H] and weight [E, H], each in its own dtype."""
        input_SBH, weight_EH = ctx.saved_tensors
        grad_NE, input_NH = grad_SBE.flatten(0, -2), input_SBH.flatten(0, -2).to(grad_SBE.dtype)
        grad_input_SBH = (grad_NE @ weight_EH.to(grad_NE.dtype)).to(input_SBH.dtype).view_as(input_SBH)
        return grad_input_SBH, (grad_NE.t() @ input_NH).to(weight_EH.dtype), None


class OriginalRouter(MegatronRouter):
    """The gate of DeepSpeed 0.9.5 (`original_gate.py`), the same under any tensor, sequence, expert, pipeline layout."""

    def __init__(self, *arguments, moe: MoEConfig, **options):
        super().__init__(*arguments, **options)
        self.moe, self.gate = moe, OriginalGate(moe, no_noise)

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        self.gate.noise = LayerNoise(layer_number)

    def routing(self, logits_SBE: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Returns weights [N, E] (fp32) and map [N, E] (bool) in Megatron-Core's order. Padding takes part.

        `padding_mask` [S, B], where rows are filled up to a multiple (`RunConfig.row_multiple`): True in the columns
        beyond the longest row. The original's batch does not have them, and they get no expert.
        """
        if self.sequence_split > 1:
            logits_SBE = gather_from_sequence_parallel_region(logits_SBE, group=self.tp_group)
        length, batch, experts = logits_SBE.shape
        width = length - self._added_columns(padding_mask)
        gate = self.gate(logits_SBE[:width].transpose(0, 1).reshape(-1, experts))
        probs_NE = self._attach(self.of_this_rank(gate.probs_NE, length, batch), gate.aux_loss)
        return probs_NE, self.of_this_rank(gate.routing_map_NE, length, batch)

    @property
    def sequence_split(self) -> int:
        """Ranks that share a sequence."""
        return self.tp_group.size() if self.config.sequence_parallel else 1

    def of_this_rank(self, item_NE: torch.Tensor, length: int, batch: int) -> torch.Tensor:
        """What the gate said of the whole sequence, batch-major, for this rank's tokens in Megatron-Core's order.

        `length`: of the sequence with the columns that the gate was not shown; they get zeros.
        """
        item_SBE = item_NE.view(batch, -1, item_NE.shape[-1]).transpose(0, 1)
        item_SBE = F.pad(item_SBE, (0, 0, 0, 0, 0, length - len(item_SBE)))
        rank = self.tp_group.rank() if self.sequence_split > 1 else 0
        return item_SBE.chunk(self.sequence_split)[rank].reshape(-1, item_NE.shape[-1])

    def _added_columns(self, padding_mask: torch.Tensor | None) -> int:
        if padding_mask is None:
            return 0
        count = padding_mask[:, 0].sum()
        if self.sequence_split > 1:
            torch.distributed.all_reduce(count, group=self.tp_group)
        return int(count)

    def _attach(self, probs_NE: torch.Tensor, aux_loss: torch.Tensor) -> torch.Tensor:
        """Add coefficient * aux loss to the loss, once per layer and micro-batch, and record it for the log.

        Every tensor-parallel rank attaches its share to its own copy, and the gather's backward sums the copies.
        """
        if not (self.training and torch.is_grad_enabled()) or self.routing_type == "none":
            return probs_NE
        self._record("load_balancing_loss", aux_loss / self.sequence_split)
        if not self.moe.aux_loss_gradient or self.moe.moe_aux_loss_coeff == 0:
            return probs_NE
        return MoEAuxLossAutoScaler.apply(probs_NE, aux_loss * (self.moe.moe_aux_loss_coeff / self.sequence_split))


BALANCING = {
    "aux_loss": MegatronRouter._aux_loss,
    "seq_aux_loss": MegatronRouter._seq_aux_loss,
    "global_aux_loss": MegatronRouter._global_aux_loss,
}


def within_capacity(
    weights_NE: torch.Tensor, asked_NE: torch.Tensor, fair: torch.Tensor, factor: float
) -> torch.Tensor:
    """The choices that find a place: each expert keeps its ceil(fair * factor) largest weights.

    `fair`: choices that an expert gets where they are spread evenly, a number or [E]; fp64. What is not asked for (padding)
    takes no place and makes none. 281 real tokens of 364, E=4, K=2, factor 1: 141 places.
    """
    capacity = (fair * factor).ceil()
    order_NE = weights_NE.masked_fill(~asked_NE, -1.0).argsort(dim=0, descending=True, stable=True)
    return asked_NE & (order_NE.argsort(dim=0) < capacity)


class LayerNoise:
    """Fresh noise from a layer's own stream, so that it depends neither on the layout nor on recomputation."""

    def __init__(self, layer_number: int):
        """Starts the stream here, before any state of the generators is taken for a recomputation."""
        self.stream, tracker = f"router-{layer_number}", get_cuda_rng_tracker()
        if self.stream not in tracker.get_states():
            seed = torch.initial_seed() % 2**31 + 100_003 * layer_number + parallel.data_parallel_rank()
            tracker.add(self.stream, seed)

    def __call__(self, logits_NE: torch.Tensor, draw: Draw) -> torch.Tensor:
        """[N, E] on the device of the logits."""
        with get_cuda_rng_tracker().fork(self.stream):
            return draw(tuple(logits_NE.shape), device=logits_NE.device)


def uniform_router_init(weight_EH: torch.Tensor) -> torch.Tensor:
    """torch.nn.Linear's default for a [E, H] weight: U(-1/sqrt(H), 1/sqrt(H)), as the original's gate starts."""
    bound = 1.0 / math.sqrt(weight_EH.shape[1])
    return torch.nn.init.uniform_(weight_EH, -bound, bound)
