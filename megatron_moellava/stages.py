"""The three stages of MoE-tuning as data: which roles of parameters each one trains (`model/roles.py` finds them)."""

import typing

from megatron_moellava.config import Role

ROLES: tuple[Role, ...] = typing.get_args(Role)
LANGUAGE = tuple(role for role in ROLES if role not in ("tower", "projector"))
STAGES = {
    1: ("projector",),
    2: ("projector", *LANGUAGE),
    3: ("projector", "language.ffn", "experts", "router"),
}
