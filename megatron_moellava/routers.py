"""The kinds of routers as data: what the rest of the package must know about each, so that nobody compares names; and which
experts are whose, where they are grouped by modality.

Free of torch, so that a run can be validated without it. `model/router.py` names the module of each kind.
"""

import math
from dataclasses import dataclass

from megatron_moellava.config import ExpertGroups, MoEConfig

MODALITIES = ("text", "image")  # a token's number: whether it is of an image


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterKind:
    """One value of `moe.router`."""

    name: str
    counts_padding: bool  # padding takes places at the experts and part in the balance, so its states matter
    always_has_capacity: bool  # an expert may turn a token away whatever `moe.moe_expert_capacity_factor` says
    evaluates_with_capacity: bool  # in evaluation too; otherwise every token has its place there
    counts_whole_sequence: bool  # places are counted over the whole sequence, not over a rank's share of it
    allows_packing: bool
    allows_context_parallelism: bool
    max_topk: int | None  # None: as many as there are experts
    balancing: tuple[str, ...]  # values of `moe.moe_router_load_balancing_type` that it knows
    lacks: tuple[str, ...] = ()  # fields of MoEConfig that it cannot honour


ROUTERS = {
    kind.name: kind
    for kind in (
        RouterKind(  # Megatron-Core's top-k: deterministic, dropless unless a capacity is set
            name="megatron",
            counts_padding=False,
            always_has_capacity=False,
            evaluates_with_capacity=False,
            counts_whole_sequence=False,
            allows_packing=True,
            allows_context_parallelism=True,
            max_topk=None,
            balancing=("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
        ),
        RouterKind(  # the gate of DeepSpeed 0.9.5, which MoE-LLaVA was trained with
            name="original",
            counts_padding=True,
            always_has_capacity=True,
            evaluates_with_capacity=True,
            counts_whole_sequence=True,
            allows_packing=False,
            allows_context_parallelism=False,
            max_topk=2,
            balancing=("aux_loss", "none"),
            lacks=(
                "moe_z_loss_coeff",
                "moe_router_enable_expert_bias",
                "normalize_top1",
                "moe_router_pre_softmax",
                "moe_router_topk_scaling_factor",
                "moe_router_num_groups",
                "expert_groups",
                "balance_per_modality",
            ),
        ),
    )
}


def experts_by_group(groups: ExpertGroups) -> tuple[str, ...]:
    """Whose each expert is, by its number.

    >>> experts_by_group(ExpertGroups(image=4, text=2, shared=2, order="dealt"))
    ('image', 'image', 'shared', 'text', 'image', 'image', 'shared', 'text')
    """
    counts = {"image": groups.image, "shared": groups.shared, "text": groups.text}
    rounds = math.gcd(*counts.values()) or 1 if groups.order == "dealt" else 1
    return tuple(name for name, count in counts.items() for _ in range(count // rounds)) * rounds


def own_experts(moe: MoEConfig) -> tuple[tuple[int, ...], ...]:
    """Of each of MODALITIES the experts of its own and the shared ones: all of them without groups."""
    if moe.expert_groups is None:
        return (tuple(range(moe.num_moe_experts)),) * len(MODALITIES)
    owners = experts_by_group(moe.expert_groups)
    return tuple(tuple(e for e, owner in enumerate(owners) if owner in (name, "shared")) for name in MODALITIES)


def admissible_experts(moe: MoEConfig) -> tuple[tuple[int, ...], ...]:
    """Of each of MODALITIES the experts that its tokens can choose at all: with a penalty all of them."""
    penalised = moe.expert_groups is not None and moe.expert_groups.penalty is not None
    return (tuple(range(moe.num_moe_experts)),) * len(MODALITIES) if penalised else own_experts(moe)


def knows_modality(moe: MoEConfig | None) -> bool:
    """Whether the routers must be told which tokens are of an image."""
    return moe is not None and (moe.expert_groups is not None or moe.balance_per_modality)
