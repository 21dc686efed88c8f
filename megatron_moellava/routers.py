"""The kinds of routers as data: what the rest of the package must know about each, so that nobody compares names.

Free of torch, so that a run can be validated without it. `model/router.py` names the module of each kind.
"""

from dataclasses import dataclass


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
            ),
        ),
    )
}
