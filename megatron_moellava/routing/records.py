"""What was observed of the routers, as sums and as numbers for logs and reports.

Shapes: E experts, G groups of tokens (`token_groups.py`), L decoder layers, C columns, M modalities.
"""

import math
from dataclasses import dataclass

import torch

from megatron_moellava.routers import MODALITIES

PER_EXPERT = ("choices", "asked", "probability")  # columns of E each: after dropping, before it, sum of probabilities
PER_TOKEN = ("tokens", "entropy", "top1", "top2")  # sums over tokens


@dataclass(frozen=True, slots=True)
class RoutingSums:
    """Sums over the tokens of one observation, the same on every rank."""

    groups: tuple[str, ...]  # the modalities first
    layers: tuple[int, ...]  # those with experts, from 0
    num_experts: int
    topk: int
    sums_GLC: torch.Tensor  # float64, on the CPU; rows of dense layers are zero
    modalities: tuple[str, ...] = MODALITIES  # the groups that split all tokens
    # of each of `modalities` the experts that its tokens can choose among; None: all of them
    admissible: tuple[tuple[int, ...], ...] | None = None

    def experts(self, group: str) -> int:
        """How many a group's tokens can choose among. All groups that are no modality are of text."""
        place = self.modalities.index(group if group in self.modalities else "text")
        return self.num_experts if self.admissible is None else len(self.admissible[place])

    def column(self, name: str) -> torch.Tensor:
        """[G, L, E] of a name in PER_EXPERT, [G, L] of one in PER_TOKEN."""
        if name in PER_TOKEN:
            return self.sums_GLC[..., len(PER_EXPERT) * self.num_experts + PER_TOKEN.index(name)]
        start = PER_EXPERT.index(name) * self.num_experts
        return self.sums_GLC[..., start : start + self.num_experts]

    @property
    def choices_LME(self) -> torch.Tensor:
        """int64 [layers, text and image and further modalities, experts]"""
        return self.column("choices")[: len(self.modalities)].transpose(0, 1).round().long()


def routing_record(sums: RoutingSums, losses: dict[str, list[float]] | None = None) -> dict:
    """JSON-able. `losses`: mean of each router loss by decoder layer.

    {"num_experts", "topk", "layers": [{"layer", numbers of all tokens, "groups": {group: the same numbers}, losses}]}

    Where experts are grouped by modality, a layer has "fair" as well (`_of_all`).
    """
    numbers = {
        group: _numbers(sums.sums_GLC[index], sums, sums.experts(group)) for index, group in enumerate(sums.groups)
    }
    everything = _numbers(sums.sums_GLC[: len(sums.modalities)].sum(dim=0), sums, sums.num_experts)
    if sums.admissible is not None:
        everything = [
            whole | _of_all(whole, [numbers[name][layer] for name in sums.modalities], sums)
            for layer, whole in enumerate(everything)
        ]
    layers = []
    for layer in sums.layers:
        own = {group: by_layer[layer] for group, by_layer in numbers.items() if by_layer[layer]["tokens"]}
        router_losses = {name: values[layer] for name, values in (losses or {}).items()}
        layers.append({"layer": layer, **everything[layer], **router_losses, "groups": own})
    return {"num_experts": sums.num_experts, "topk": sums.topk, "layers": layers}


def _of_all(whole: dict, modalities: list[dict], sums: RoutingSums) -> dict:
    """What experts by modality make other numbers of: choices that each expert would get if each modality spread evenly
    (`fair`), the busiest expert over that, and means over tokens of what is 1 for a modality on its own."""
    assert sums.admissible is not None
    tokens = max(whole["tokens"], 1)
    fair = [0.0] * sums.num_experts
    for mine, experts in zip(modalities, sums.admissible, strict=True):
        for expert in experts:
            fair[expert] += mine["tokens"] * sums.topk / len(experts)
    asked = [kept + lost for kept, lost in zip(whole["choices"], whole["dropped"], strict=True)]
    means = {name: sum(mine[name] * mine["tokens"] for mine in modalities) / tokens for name in ("entropy", "balance")}
    load = max((count / even for count, even in zip(asked, fair, strict=True) if even), default=0.0)
    return {"fair": fair, "max_load": load, **means}


def _numbers(sums_LC: torch.Tensor, sums: RoutingSums, experts: int) -> list[dict]:
    """By decoder layer: tokens; choices and dropped choices of each expert; entropy (share of the largest possible),
    mean probability of the first and the second expert; max_load (busiest expert over the mean); balance (Switch
    Transformer's auxiliary loss over all these tokens: 1 is perfect, the number of experts the worst).

    `experts`: that these tokens can choose among."""
    part = RoutingSums(sums.groups, sums.layers, sums.num_experts, sums.topk, sums_LC)
    choices_LE, asked_LE, probability_LE = (part.column(name) for name in PER_EXPERT)
    tokens_L, entropy_L, top1_L, top2_L = (part.column(name) for name in PER_TOKEN)
    share_LE = asked_LE / asked_LE.sum(dim=-1, keepdim=True).clamp(min=1)
    count_L = tokens_L.clamp(min=1)
    columns = {
        "tokens": tokens_L.long().tolist(),
        "choices": choices_LE.round().long().tolist(),
        "dropped": (asked_LE - choices_LE).round().long().tolist(),
        "entropy": (entropy_L / count_L / math.log(max(experts, 2))).tolist(),
        "top1": (top1_L / count_L).tolist(),
        "top2": (top2_L / count_L).tolist(),
        "max_load": (share_LE.max(dim=-1).values * experts).tolist(),
        "balance": ((share_LE * probability_LE / count_L[:, None]).sum(dim=-1) * experts).tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
