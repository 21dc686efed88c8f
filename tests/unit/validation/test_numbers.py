"""The table of what each number may be."""

import math

import pytest

from megatron_moellava.config import RunConfig, from_dict, set_override
from megatron_moellava.validation.numbers import RULES, number_problems

REQUIRED = {  # what a section does not go without
    "moe.expert_groups": {"image": 2, "text": 2},
    "training.distillation": {"teacher_logits": "logits"},
}


def problems(path: str, value) -> list[str]:
    tree: dict = {"model": {"backbone": "llama-tiny"}, "training": {"stage": 3}, "moe": {}}
    for section, required in REQUIRED.items():
        if path.startswith(section):
            set_override(tree, section, dict(required))
    set_override(tree, path, value)
    return list(number_problems(from_dict(RunConfig, tree)))


def test_defaults_are_legal():
    assert problems("training.seed", 1) == []


@pytest.mark.parametrize("path", RULES)
def test_a_number_below_every_limit_is_refused_by_name(path):
    """No field of the table may be negative; what is a share or a rate may not be undefined either."""
    assert problems(path, -1)[0].startswith(f"{path}=-1")
    _, rule = RULES[path]
    assert problems(path, -1)[0].endswith(rule)


@pytest.mark.parametrize(
    "path", ["optimizer.lr", "optimizer.adam_eps", "moe.eval_capacity_factor", "data.max_skip_share"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_finite_number_is_refused(path, value):
    assert len(problems(path, value)) == 1


def test_an_unset_number_is_legal_and_a_dense_run_has_no_experts_to_judge():
    run = from_dict(RunConfig, {"model": {"backbone": "llama-tiny"}, "training": {"stage": 1}})
    assert run.moe is None and list(number_problems(run)) == []
