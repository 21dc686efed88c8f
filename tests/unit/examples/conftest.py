"""The quickstart's modules, as its programs see them: the folder itself is on the path. And a program of the ablations."""

import importlib
import json

import pytest

from tests.helpers.paths import REPO


@pytest.fixture(autouse=True)
def quickstart_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples/quickstart"))


@pytest.fixture
def program(request, monkeypatch):
    """What the test file names in PROGRAM, of examples/ablations."""
    monkeypatch.syspath_prepend(str(REPO / "examples/ablations"))
    return importlib.import_module(request.module.PROGRAM)


@pytest.fixture
def rows(program):
    """The data in the repository that `program` makes its page of."""
    from pages import DOCS

    return [json.loads(line) for line in (DOCS / program.DATA).open()]


@pytest.fixture
def written(program):
    """The page in the repository that `program` makes."""
    from pages import DOCS

    return (DOCS / program.PAGE).read_text()


@pytest.fixture
def grid(request, program):
    """The grid that the test file names in GRID."""
    from pages import HERE

    from megatron_moellava.experiments.grid import load_grid

    return load_grid(HERE / f"{request.module.GRID}.yaml")
