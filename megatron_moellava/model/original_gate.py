"""The gate of MoE-LLaVA: DeepSpeed 0.9.5's top-1 and top-2 gating, as pure functions of logits and noise, and `OriginalGate`,
the module that applies them as a run asks for.

It differs from Megatron-Core's top-k in five ways: the second expert is sampled (Gumbel noise on the logits, in
evaluation too), every expert takes a fixed number of tokens by position (all first choices before any second choice),
the weights are renormalised over the choices that survive, the balance loss looks at first choices only, and padding
takes part in everything. Shapes: N tokens in batch-major order, E experts, K choices of a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_moellava.config import MoEConfig

Draw = Callable[..., torch.Tensor]  # (shape, device=...) -> fp32 samples: torch.rand or `gumbel`
Noise = Callable[[torch.Tensor, Draw], torch.Tensor]  # (logits [N, E], draw) -> noise [N, E]


@dataclass(frozen=True, slots=True)
class Gate:
    """Where the gate sends N tokens, and with which weights."""

    probs_NE: torch.Tensor  # combine weights, fp32, zero where a token is not sent
    routing_map_NE: torch.Tensor  # bool, where a token is sent
    choices_NK: torch.Tensor  # int64, the experts that a token asks for, best first, before dropping
    slots_NE: torch.Tensor  # int64, the token's place in the expert's batch, -1 where it is not sent
    capacity: int  # slots per expert
    aux_loss: torch.Tensor  # E * sum_e(mean softmax_e * share of first choices_e), before dropping; 1 when balanced


class OriginalGate(torch.nn.Module):
    """The choices of all tokens of a micro-batch, from their logits [N, E] in batch-major order. Without parameters.

    `noise`: where fresh noise comes from; a layer's own stream in training and generation (`router.LayerNoise`), recorded
    noise where the original is reproduced. `drops` = False gives every token a place, as if it were alone (decoding:
    requests must not compete).
    """

    def __init__(self, moe: MoEConfig, noise: Noise):
        super().__init__()
        self.moe, self.noise, self.drops = moe, noise, True

    def forward(self, logits_NE: torch.Tensor) -> Gate:
        """Deterministic but for the noise: the same logits and noise give the same choices on every rank."""
        moe = self.moe
        factor = moe.moe_expert_capacity_factor if self.training else moe.eval_capacity_factor
        assert factor is not None, "this router always has a capacity"
        num_tokens, num_experts = logits_NE.shape
        slots = expert_capacity(num_tokens, num_experts, factor, moe.moe_router_topk, moe.min_capacity)
        slots = slots if self.drops else len(logits_NE)
        if moe.moe_router_topk == 1:
            return top1_gate(logits_NE, slots, self.noise(logits_NE, torch.rand))
        if moe.second_choice == "deterministic":
            return top2_gate(logits_NE, slots, torch.zeros_like(logits_NE))
        return top2_gate(logits_NE, slots, self.noise(logits_NE, gumbel))


def no_noise(logits_NE: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Zeros: the second best is the second choice, and a full expert keeps its first tokens."""
    return torch.zeros_like(logits_NE)


def expert_capacity(num_tokens: int, num_experts: int, factor: float, topk: int, min_capacity: int) -> int:
    """Slots per expert: ceil(N / E * factor * k) in fp32 as DeepSpeed multiplies, at least `min_capacity`.

    N=100, E=4, factor=1.5, k=2 -> 75.
    """
    slots = torch.tensor(num_tokens / num_experts, dtype=torch.float32) * torch.tensor(
        factor * topk, dtype=torch.float32
    )
    return max(math.ceil(slots.item()), min_capacity)


def gumbel(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Gumbel(0, 1) noise in fp32."""
    return -torch.empty(shape, device=device).exponential_().log()


def top2_gate(logits_NE: torch.Tensor, capacity: int, noise_NE: torch.Tensor) -> Gate:
    """Two experts per token: the best, and one drawn from the rest by `noise` (zeros: the second best)."""
    gates_NE = logits_NE.softmax(dim=-1)
    first_NE = _one_hot(gates_NE.argmax(dim=-1), gates_NE)
    second_NE = _one_hot((logits_NE + noise_NE).masked_fill(first_NE, float("-inf")).argmax(dim=-1), gates_NE)

    # A dropped first choice still takes its place in the queue that second choices join.
    places_first_NE = first_NE.cumsum(dim=0) - 1
    places_second_NE = second_NE.cumsum(dim=0) - 1 + first_NE.sum(dim=0)
    kept_NE = (first_NE & (places_first_NE < capacity)) | (second_NE & (places_second_NE < capacity))

    weights_NE = gates_NE * kept_NE
    total_N1 = weights_NE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    return Gate(
        probs_NE=weights_NE / total_N1,
        routing_map_NE=kept_NE,
        choices_NK=torch.stack([first_NE.int().argmax(dim=-1), second_NE.int().argmax(dim=-1)], dim=1),
        slots_NE=torch.where(first_NE, places_first_NE, places_second_NE).masked_fill(~kept_NE, -1),
        capacity=capacity,
        aux_loss=_balance_loss(gates_NE, first_NE),
    )


def top1_gate(logits_NE: torch.Tensor, capacity: int, uniform_NE: torch.Tensor) -> Gate:
    """One expert per token, weighted by its raw probability; a full expert keeps random tokens (largest `uniform`)."""
    gates_NE = logits_NE.softmax(dim=-1)
    first_NE = _one_hot(gates_NE.argmax(dim=-1), gates_NE)
    chosen_CE = (first_NE * uniform_NE).topk(min(capacity, len(logits_NE)), dim=0).indices
    kept_NE = first_NE & torch.zeros_like(first_NE).scatter(0, chosen_CE, True)
    return Gate(
        probs_NE=gates_NE * kept_NE,
        routing_map_NE=kept_NE,
        choices_NK=first_NE.int().argmax(dim=-1, keepdim=True),
        slots_NE=(kept_NE.cumsum(dim=0) - 1).masked_fill(~kept_NE, -1),
        capacity=capacity,
        aux_loss=_balance_loss(gates_NE, first_NE),
    )


def _one_hot(choice_N: torch.Tensor, like_NE: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_NE, dtype=torch.bool).scatter(1, choice_N[:, None], True)


def _balance_loss(gates_NE: torch.Tensor, first_NE: torch.Tensor) -> torch.Tensor:
    return (gates_NE.mean(dim=0) * first_NE.float().mean(dim=0)).sum() * gates_NE.shape[1]
