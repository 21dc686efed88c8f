"""The three stages as data."""

import typing

from megatron_moellava.config import LoraConfig, LoraTarget, TrainingConfig
from megatron_moellava.stages import (
    ADAPTERS,
    BESIDE_ADAPTERS,
    LANGUAGE,
    ROLES,
    STAGES,
    TARGETS,
    USUAL_TARGETS,
    trained_roles,
)


def test_stages_train_what_the_paper_says():
    """Stage 1 the projector, stage 2 all but the tower, stage 3 the projector and what stands in place of the FFN."""
    assert STAGES[1] == ("projector",)
    assert set(STAGES[2]) == set(ROLES) - {"tower"}
    assert set(STAGES[3]) == {"projector", "language.ffn", "experts", "router"}


def test_every_trained_role_is_one_of_the_roles_and_named_once():
    for roles in (*STAGES.values(), *BESIDE_ADAPTERS.values(), TARGETS.values(), ROLES, LANGUAGE):
        assert len(set(roles)) == len(roles) and set(roles) <= set(ROLES)


def test_beside_adapters_a_stage_trains_what_is_new_and_nothing_that_they_adapt():
    assert set(TARGETS) == {*typing.get_args(LoraTarget)} > {*USUAL_TARGETS}
    assert ADAPTERS not in ROLES
    for stage, whole in ((2, {"projector"}), (3, {"projector", "router"})):
        assert set(trained_roles(TrainingConfig(stage=stage, lora=LoraConfig()))) == whole | {ADAPTERS}
        adapted = LoraConfig(targets=("router", "projector"))
        assert trained_roles(TrainingConfig(stage=stage, lora=adapted)) == (ADAPTERS,)
        assert trained_roles(TrainingConfig(stage=stage, lora=LoraConfig(), trains=())) == (ADAPTERS,)
        assert trained_roles(TrainingConfig(stage=stage)) == STAGES[stage]
