"""What computes here: on a CPU, a right product and a reduction of one process; and what is said where they fail."""

import pytest
import torch
import torch.distributed as dist

from megatron_moellava import parallel, platform
from megatron_moellava.doctor import devices
from tests.helpers.process_groups import release_groups


@pytest.fixture(autouse=True)
def no_groups():
    parallel.shutdown()
    release_groups()


def test_a_cpu_computes_and_reduces():
    found = {finding.name: finding for finding in devices.compute()}
    assert found["GPU"].found in ("none", "not usable") and "on the CPU" in found["GPU"].meaning
    assert found["a product"].found.startswith("right, in ")
    assert found["a reduction"].found == "works, by gloo"
    assert found["precision"].found in ("auto is bf16", "auto is fp32")
    assert not dist.is_initialized()


def test_a_gpu_that_torch_cannot_use_is_noted(monkeypatch):
    monkeypatch.setattr(devices, "sees_gpus", lambda: True)
    (finding,) = devices.gpus()
    assert (finding.found, finding.level) == ("not usable", "note")
    assert torch.__version__ in finding.meaning


def test_gpus_are_listed_with_memory_and_capability(monkeypatch):
    monkeypatch.setattr(platform, "gpus", lambda: [("H200", 141 << 30, (9, 0))] * 2)
    monkeypatch.setattr(platform, "nccl_version", lambda: "2.27.5")
    found = {finding.name: finding.found for finding in devices.gpus()}
    assert found["GPU 1"] == "H200, 141 GiB, compute capability 9.0"
    assert found["CUDA"].endswith("NCCL 2.27.5")


def test_what_fails_is_a_problem_with_the_first_line_of_why(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch, "ones", fails)
    assert devices.product("bf16").meaning == "CUDA error: no kernel image is available"
    monkeypatch.setattr(dist, "init_process_group", fails)
    assert devices.reduction().level == "problem"
    assert "GLOO_SOCKET_IFNAME" in devices.reduction().meaning


def test_variables_that_tell_are_shown_and_no_others():
    found = list(devices.environment({"NCCL_DEBUG": "INFO", "HOME": "/root", "CUDA_VISIBLE_DEVICES": ""}))
    assert [(finding.name, finding.found) for finding in found] == [
        ("CUDA_VISIBLE_DEVICES", "(empty)"),
        ("NCCL_DEBUG", "INFO"),
    ]
