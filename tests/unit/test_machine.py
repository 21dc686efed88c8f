"""What a machine has, as told without torch."""

import os

import pytest

from megatron_moellava import machine, platform


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_hidden_gpu_is_none(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine.this_machine()
    assert not (found.has_gpu or found.has_transformer_engine or found.has_gradient_fusion)


def test_a_run_may_say_where_it_will_run():
    """On a login node `training.device=cuda` means the GPUs of the job; `cpu` means none wherever it is."""
    assert machine.this_machine("cuda") == machine.GPU_CLUSTER
    assert not machine.this_machine("cpu").has_gpu


def test_the_guess_is_what_torch_finds_here():
    if not platform.HAS_CUDA and machine.this_machine().has_gpu:
        pytest.skip("a GPU that this build of torch cannot use")
    assert machine.this_machine() == platform.machine()


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocators_own_setting_of_the_user_stays(own, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(own, "max_split_size_mb:128")
    machine.choose()
    assert "expandable_segments:True" not in (os.environ.get("PYTORCH_ALLOC_CONF"), os.environ[own])


def test_segments_of_the_allocator_grow(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    machine.choose()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
