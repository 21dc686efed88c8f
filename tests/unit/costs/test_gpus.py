"""GPUs are found by what CUDA calls them, and only where their peak is known."""

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.costs.gpus import GPUS, get_gpu, gpu_of_device


def test_a_device_is_found_by_its_full_name():
    assert gpu_of_device("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_of_device("NVIDIA A100-SXM4-40GB") is GPUS["a100-40"]
    assert gpu_of_device("NVIDIA H100 PCIe") is None, "another peak than the SXM's"


def test_no_name_belongs_to_two_gpus():
    names = [name for gpu in GPUS.values() for name in gpu.device_names]
    assert len(names) == len(set(names)) >= 5


def test_peak_is_of_the_format_in_use():
    assert GPUS["h100"].peak() == 989e12 and GPUS["h100"].peak(fp8=True) == 1979e12
    assert GPUS["a100-80"].peak(fp8=True) == 312e12, "no FP8 units: bf16"


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="h100"):
        get_gpu("h10")
