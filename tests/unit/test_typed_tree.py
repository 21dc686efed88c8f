"""Nested plain data as dataclasses: what is converted, what is refused, and that all of it is said."""

from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_moellava.typed_tree import build


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    number: int = 1
    flag: bool = False
    mode: Literal["none", "full"] = "none"
    stage: Literal[1, 2, 3] = 1
    optional: Literal["a", "b"] | None = None
    either: Literal["even"] | tuple[int, ...] = "even"
    inner: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("number", 3, 3),
        ("mode", "full", "full"),
        ("stage", "3", 3),  # as a command line has it
        ("optional", None, None),
        ("optional", "b", "b"),
        ("either", [1, 2], (1, 2)),
        ("either", "even", "even"),
        ("inner", [{"name": "x", "share": "1e-3"}], (Inner(name="x", share=1e-3),)),
        ("inner", [{"name": 7, "share": 1}], (Inner(name="7", share=1.0),)),
    ],
)
def test_legal_values_are_taken(name, value, result):
    built, problems = build(Outer, {name: value})
    assert (getattr(built, name), problems) == (result, [])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("number", True, "number=True must be of type int"),
        ("number", "three", "number='three' must be of type int"),
        ("flag", 1, "flag=1 must be of type bool"),
        ("mode", "ful", "mode='ful' is not supported; did you mean full? Use one of: none, full"),
        ("mode", 5, "mode=5 is not supported; use one of: none, full"),
        ("mode", None, "mode=None is not supported; did you mean none? Use one of: none, full"),
        ("stage", True, "stage=True is not supported; use one of: 1, 2, 3"),
        ("optional", "c", "optional='c' is not supported; use one of: a, b"),
        ("either", "evn", "either='evn' is not supported; did you mean even? Use one of: even"),
        ("either", ["one"], "either[0]='one' must be of type int"),
        ("inner", [{"share": 1}], "inner[0].name is required"),
        ("inner", [{"name": "x", "shar": 1}], "inner[0].shar is not a field; did you mean inner[0].share"),
        ("inner", ["x"], "inner[0]='x' must be a section with the fields of Inner"),
    ],
)
def test_anything_else_is_a_problem_and_leaves_the_default(name, value, message):
    built, problems = build(Outer, {name: value})
    assert len(problems) == 1 and problems[0].startswith(message)
    assert getattr(built, name) == getattr(Outer(), name) or "shar" in problems[0]


def test_all_problems_are_said_and_a_missing_field_leaves_nothing_to_build():
    assert build(Outer, {"number": "x", "mode": "y", "what": 1})[1].__len__() == 3
    assert build(Inner, {"share": "x"}) == (None, ["name is required", "share='x' must be of type float"])
