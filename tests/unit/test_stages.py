"""The three stages as data."""

from megatron_moellava.stages import LANGUAGE, ROLES, STAGES


def test_stages_train_what_the_paper_says():
    """Stage 1 the projector, stage 2 all but the tower, stage 3 the projector and what stands in place of the FFN."""
    assert STAGES[1] == ("projector",)
    assert set(STAGES[2]) == set(ROLES) - {"tower"}
    assert set(STAGES[3]) == {"projector", "language.ffn", "experts", "router"}


def test_every_trained_role_is_one_of_the_roles_and_named_once():
    for roles in (*STAGES.values(), ROLES, LANGUAGE):
        assert len(set(roles)) == len(roles) and set(roles) <= set(ROLES)
