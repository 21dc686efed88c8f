"""A small grid of runs."""

import pytest

from tests.helpers.grids import made


@pytest.fixture
def grid(tmp_path):
    return made(tmp_path)
