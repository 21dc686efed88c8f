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
def avx2(monkeypatch):
    """The environment keeps the processor from bf16, as far as our own choice goes.

    torch reads the variable once, at its first operation: it has done so before the variable is set, or every later test
    of the process would compute with other kernels.
    """
    import torch

    torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")


@pytest.fixture
def world():
    """The process groups of one process, seeded; gone afterwards."""
    from megatron_moellava import parallel
    from megatron_moellava.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=1)
    yield parallel
    parallel.shutdown()
