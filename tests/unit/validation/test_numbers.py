"""What each number of a run may be by itself."""

import dataclasses
import typing

import pytest

from megatron_moellava.config import RunConfig
from megatron_moellava.validation.numbers import RULES, number_problems
from tests.helpers.runs import tiny


def test_every_rule_is_about_a_field_and_its_default_is_legal():
    sections = typing.get_type_hints(RunConfig)
    for path in RULES:
        section, name = path.split(".")
        options = [
            item for item in (sections[section], *typing.get_args(sections[section])) if dataclasses.is_dataclass(item)
        ]
        assert name in {field.name for field in dataclasses.fields(options[0])}, path
    assert list(number_problems(tiny())) == []


@pytest.mark.parametrize("path", RULES)
def test_a_number_out_of_its_range_is_named_with_the_rule(path):
    wrong = -1 if RULES[path][0](0) else 0
    (problem, *_) = number_problems(tiny(**{path: wrong}))
    assert any(item.startswith(f"{path}={wrong}") for item in number_problems(tiny(**{path: wrong}))), problem


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_legal(value):
    for path in ("optimizer.lr", "optimizer.weight_decay", "optimizer.adam_eps", "moe.moe_aux_loss_coeff"):
        assert any(path in problem for problem in number_problems(tiny(**{path: value})))
