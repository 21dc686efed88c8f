"""Plain data made into dataclasses, with every problem named."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from megatron_moellava.typed_tree import build


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["red", "green", 3] = "red"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    sizes: tuple[int, ...] = ()
    place: str | tuple[int, ...] = "all"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"name": "a"}, Outer(name="a")),
        ({"name": 7}, Outer(name="7")),  # YAML reads 7 where a name is meant
        ({"name": "a", "inner": {"rate": "1e-4"}}, Outer(name="a", inner=Inner(rate=1e-4))),
        ({"name": "a", "inner": {"rate": 2, "kind": "3"}}, Outer(name="a", inner=Inner(rate=2.0, kind=3))),
        ({"name": "a", "sizes": [1, 2]}, Outer(name="a", sizes=(1, 2))),
        ({"name": "a", "sizes": 1}, Outer(name="a", sizes=(1,))),
        ({"name": "a", "place": [0, 2]}, Outer(name="a", place=(0, 2))),
        ({"name": "a", "maybe": {}}, Outer(name="a", maybe=Inner())),
        ({"name": "a", "maybe": None}, Outer(name="a")),
    ],
)
def test_harmless_spellings_are_read(tree, expected):
    assert build(Outer, tree) == (expected, [])


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        ({}, "name is required"),
        ({"name": "a", "cuont": 2}, "cuont is not a field; did you mean count?"),
        ({"name": "a", "count": 1.5}, "count=1.5 must be of type int"),
        ({"name": "a", "count": True}, "count=True must be of type int"),
        ({"name": "a", "flag": 1}, "flag=1 must be of type bool"),
        ({"name": "a", "sizes": [1, "x"]}, "sizes[1]='x' must be of type int"),
        (
            {"name": "a", "inner": {"kind": "grean"}},
            "inner.kind='grean' is not supported; did you mean green? Use one of: ",
        ),
        ({"name": "a", "inner": 3}, "inner=3 must be a section with the fields of Inner"),
        ({"name": "a", "inner": {"rate": "fast"}}, "inner.rate='fast' must be of type float"),
    ],
)
def test_each_mistake_is_named_with_its_path(tree, problem):
    _, problems = build(Outer, tree)
    assert len(problems) == 1 and problems[0].startswith(problem)


def test_all_mistakes_are_named_at_once_and_the_rest_is_built():
    built, problems = build(Outer, {"name": "a", "count": "x", "flag": "y", "inner": {"rate": 0.1, "size": 1}})
    assert len(problems) == 3 and built == Outer(name="a", inner=Inner(rate=0.1))
    assert build(Outer, {"count": 2})[0] is None, "without its name there is nothing"
