"""What a machine has, as told without torch."""

import os
from dataclasses import replace

import pytest
import torch

from megatron_moellava import machine, platform
from megatron_moellava.machine import Machine


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


CPU = Machine(has_gpu=False, has_transformer_engine=False)
SAPPHIRE = frozenset({"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
AMD = frozenset({"avx2", "avx512f", "avx512_bf16"})
GRAVITON = frozenset({"asimd", "sve", "bf16"})
SKYLAKE = frozenset({"avx2", "avx512f", "avx512bw"})
LAPTOP = frozenset({"avx2", "fma"})


def gpu(*capability: int) -> Machine:
    return replace(CPU, has_gpu=True, compute_capability=capability or None)


@pytest.mark.parametrize(
    ("where", "flags", "environment", "precision", "reason"),
    [
        (gpu(9, 0), LAPTOP, {"ATEN_CPU_CAPABILITY": "avx2"}, "bf16", "GPU"),
        (gpu(8, 0), LAPTOP, {}, "bf16", "GPU"),
        (gpu(), LAPTOP, {}, "bf16", "GPU"),  # not known before torch is there
        (gpu(7, 5), SAPPHIRE, {}, "fp16", "compute capability 7.5 does not multiply in bf16"),
        (machine.GPU_CLUSTER, frozenset(), {}, "bf16", "GPU"),
        (CPU, SAPPHIRE, {}, "bf16", "has bf16 units"),
        (CPU, AMD, {}, "bf16", "has bf16 units"),
        (CPU, GRAVITON, {}, "bf16", "has bf16 units"),
        (CPU, SKYLAKE, {}, "fp32", "no bf16 units"),
        (CPU, LAPTOP, {}, "fp32", "no bf16 units"),
        (CPU, frozenset(), {}, "fp32", "no bf16 units"),
        (CPU, SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32", "ONEDNN_MAX_CPU_ISA=AVX2 keeps"),
        (CPU, SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "fp32", "ONEDNN_MAX_CPU_ISA=avx512_core keeps"),
        (CPU, SAPPHIRE, {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "fp32", "DNNL_MAX_CPU_ISA=AVX512_CORE_VNNI"),
        (CPU, SAPPHIRE, {"ATEN_CPU_CAPABILITY": "avx2"}, "fp32", "ATEN_CPU_CAPABILITY=avx2 keeps"),
        (CPU, SAPPHIRE, {"ATEN_CPU_CAPABILITY": "default"}, "fp32", "ATEN_CPU_CAPABILITY=default keeps"),
        (CPU, SAPPHIRE, {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "ALL"}, "bf16", "has bf16 units"),
        (CPU, SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16", "has bf16 units"),
        (CPU, SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "bf16", "has bf16 units"),
        (CPU, LAPTOP, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "fp32", "no bf16 units"),
    ],
)
def test_auto_is_the_precision_that_the_machine_multiplies_in(where, flags, environment, precision, reason):
    chosen, why = machine.fastest_precision(where, flags, environment)
    assert chosen == precision and reason in why


def test_bf16_where_it_is_slow_is_warned_of_and_nothing_else(avx2):
    said = machine.slowness("bf16", CPU)
    assert said.startswith("warning: ") and machine.SLOWER_WITHOUT_UNITS in said and "\n" not in said
    assert machine.slowness("fp32", CPU) == machine.slowness("bf16", gpu(8, 0)) == ""


def test_the_processor_says_what_it_can():
    """An AVX2 machine of the tests may have no bf16, but every Linux processor has flags."""
    assert machine.cpu_flags() & {"avx2", "asimd"}


def test_a_guess_agrees_with_torch_where_torch_knows(monkeypatch):
    """torch.cpu knows what the processor has; what the environment keeps it from, only this module does."""
    for name in machine.HELD_BACK_BY:
        monkeypatch.delenv(name, raising=False)
    if "avx2" not in machine.cpu_flags():
        pytest.skip("torch asks x86 processors only")
    knows = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert machine.fastest_precision(CPU)[0] == ("bf16" if knows else "fp32")


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
