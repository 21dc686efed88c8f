"""What a machine has, told without torch."""

import pytest

from megatron_moellava import machine
from megatron_moellava.machine import GPU_CLUSTER, this_machine


def test_a_run_for_gpus_is_checked_as_on_gpus_wherever_it_is_checked():
    assert this_machine("cuda") is GPU_CLUSTER and GPU_CLUSTER.has_gpu


def test_a_run_on_the_cpu_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "_sees_gpus", lambda: True)
    assert not this_machine("cpu").has_gpu and this_machine("auto").has_gpu


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_are_not_there(hidden, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = this_machine()
    assert not found.has_gpu and not found.has_transformer_engine


def test_it_agrees_with_torch():
    from megatron_moellava import platform

    assert this_machine().has_gpu == platform.HAS_CUDA == platform.MACHINE.has_gpu
