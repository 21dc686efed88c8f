"""Fixtures that several unit tests ask for by name."""

import pytest


@pytest.fixture
def stub(tmp_path):
    """A Python that writes down what it is asked to run, one JSON list a call."""
    file = tmp_path / "python"
    file.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done > "$ASKED"\n')
    file.chmod(0o755)
    return file


@pytest.fixture
def world():
    """The process groups of one process, seeded; gone afterwards."""
    from megatron_moellava import parallel
    from megatron_moellava.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=1)
    yield parallel
    parallel.shutdown()
