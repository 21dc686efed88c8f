"""GPUs as data: what their data sheets say. The planner prices with it, the training log takes its peaks from it."""

import difflib
from dataclasses import dataclass

from megatron_moellava.config import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator in its usual node. Rates per GPU and direction, in bytes or dense FLOP per second."""

    name: str
    device_names: tuple[str, ...] = ()  # what CUDA calls it; others of the family (PCIe, NVL) have other peaks
    source: str
    peak_bf16: float
    peak_fp8: float | None  # None: no such units
    memory: float  # bytes that a process can use
    memory_bandwidth: float
    nvlink_bandwidth: float  # to the other GPUs of the node
    network_bandwidth: float  # to other nodes
    gpus_per_node: int = 8

    def peak(self, fp8: bool = False) -> float:
        """Dense FLOP per second of the matrix units, in FP8 where it is used and there is any, else in bf16."""
        return self.peak_fp8 if fp8 and self.peak_fp8 else self.peak_bf16


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            device_names=("NVIDIA H100 80GB HBM3",),
            source="NVIDIA H100 data sheet (SXM5, 80 GB); NDR InfiniBand, one 400 Gb/s port per GPU",
            peak_bf16=989e12,
            peak_fp8=1979e12,
            memory=79.1 * GIB,
            memory_bandwidth=3.35e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Gpu(
            name="h200",
            device_names=("NVIDIA H200",),
            source="NVIDIA H200 data sheet (SXM, 141 GB)",
            peak_bf16=989e12,
            peak_fp8=1979e12,
            memory=139.8 * GIB,
            memory_bandwidth=4.8e12,
            nvlink_bandwidth=450e9,
            network_bandwidth=50e9,
        ),
        Gpu(
            name="b200",
            device_names=("NVIDIA B200",),
            source="NVIDIA B200 data sheet (HGX, 180 GB)",
            peak_bf16=2250e12,
            peak_fp8=4500e12,
            memory=178.0 * GIB,
            memory_bandwidth=7.7e12,
            nvlink_bandwidth=900e9,
            network_bandwidth=50e9,
        ),
        Gpu(
            name="a100-80",
            device_names=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
            source="NVIDIA A100 data sheet (SXM4, 80 GB); HDR InfiniBand, 200 Gb/s per GPU",
            peak_bf16=312e12,
            peak_fp8=None,
            memory=79.1 * GIB,
            memory_bandwidth=2.04e12,
            nvlink_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Gpu(
            name="a100-40",
            device_names=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
            source="NVIDIA A100 data sheet (SXM4, 40 GB)",
            peak_bf16=312e12,
            peak_fp8=None,
            memory=39.4 * GIB,
            memory_bandwidth=1.555e12,
            nvlink_bandwidth=300e9,
            network_bandwidth=25e9,
        ),
        Gpu(
            name="v100-32",
            source="NVIDIA V100 data sheet (SXM2, 32 GB); fp16 instead of bf16, which it lacks; only to read the paper's hours",
            peak_bf16=125e12,
            peak_fp8=None,
            memory=31.7 * GIB,
            memory_bandwidth=0.9e12,
            nvlink_bandwidth=150e9,
            network_bandwidth=12.5e9,
        ),
    )
}


def get_gpu(name: str) -> Gpu:
    """A GPU by name; ConfigError with the nearest names."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=3, cutoff=0.3) or sorted(GPUS)
    raise ConfigError(f"--gpu {name} is not known; use {', '.join(near)}, or add one to costs/gpus.py")


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls `device_name`; None if its data sheet is not in the table."""
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)
