"""The three stages of MoE-tuning, and preferences after them, as data: which roles of parameters each one trains.

`model/roles.py` finds the parameters of a role.
"""

import typing

from megatron_moellava.config import LoraConfig, LoraTarget, Role, TrainingConfig

ROLES: tuple[Role, ...] = typing.get_args(Role)
LANGUAGE: tuple[Role, ...] = tuple(role for role in ROLES if role not in ("tower", "projector"))
STAGES: dict[int, tuple[Role, ...]] = {
    1: ("projector",),
    2: ("projector", *LANGUAGE),
    3: ("projector", "language.ffn", "experts", "router"),
    4: ("projector", *LANGUAGE),
}
DISTILLED = (2, 3)  # stages that may learn from a teacher's logits
PREFERENCE = 4  # the stage that trains on pairs of answers

ADAPTERS = "adapters"  # the role of what training.lora adds; trained wherever it is there
# Trained whole beside the adapters: the projector, as LLaVA does, and the router, which stage 3 starts from random weights.
BESIDE_ADAPTERS: dict[int, tuple[Role, ...]] = {
    1: ("projector",),
    2: ("projector",),
    3: ("projector", "router"),
    4: ("projector",),
}
# The role of the matrices that each target stands for.
TARGETS: dict[LoraTarget, Role] = {
    "attention": "language.attention",
    "ffn": "language.ffn",
    "experts": "experts",
    "router": "router",
    "projector": "projector",
    "tower": "tower",
}
USUAL_TARGETS: tuple[LoraTarget, ...] = ("attention", "ffn", "experts")


def adapted_roles(lora: LoraConfig | None) -> tuple[Role, ...]:
    """The roles whose matrices have adapters beside them, if the model has such matrices."""
    return () if lora is None else tuple(TARGETS[target] for target in lora.targets or USUAL_TARGETS)


def usual_roles(stage: int, lora: LoraConfig | None) -> tuple[Role, ...]:
    """What `training.trains` stands for when it is unset."""
    if lora is None:
        return STAGES[stage]
    return tuple(role for role in BESIDE_ADAPTERS[stage] if role not in adapted_roles(lora))


def trained_roles(training: TrainingConfig) -> tuple[str, ...]:
    """The roles that receive gradients: those of `training.trains` or of the stage, and the adapters."""
    whole = training.trains if training.trains is not None else usual_roles(training.stage, training.lora)
    return whole if training.lora is None else (*whole, ADAPTERS)


def part_of(role: str) -> str:
    """The field of `optimizer.roles` that speaks for a role: all of the language model's have one."""
    return role.partition(".")[0]
