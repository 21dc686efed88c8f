"""The quickstart's modules, as its programs see them: the folder itself is on the path."""

import pytest

from tests.helpers.paths import REPO


@pytest.fixture(autouse=True)
def quickstart_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples/quickstart"))
