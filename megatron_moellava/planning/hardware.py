"""GPUs as data, and the efficiencies that turn a data sheet into a prediction.

Nothing here was measured by this project: data-sheet peaks, and constants whose origin stands beside them. The only
number that was fitted is `CALIBRATION` (docs/measurements/planning.md says to which run).
"""

import difflib
from dataclasses import dataclass

from megatron_moellava.config import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator in its usual node. Rates per GPU and direction, in bytes or dense FLOP per second."""

    name: str
    source: str
    peak_bf16: float
    peak_fp8: float | None  # None: no such units
    memory: float  # bytes that a process can use
    memory_bandwidth: float
    nvlink_bandwidth: float  # to the other GPUs of the node
    network_bandwidth: float  # to other nodes
    gpus_per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
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
    raise ConfigError(f"--gpu {name} is not known; use {', '.join(near)}, or add one to planning/hardware.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of a peak that real kernels reach."""

    matmul: float  # of the tensor cores' dense peak, large products
    grouped_matmul: float  # the same, experts' grouped products
    attention: float  # flash attention, forward and backward together
    memory: float  # of the memory bandwidth, for element-wise kernels
    nvlink: float  # of the NVLink rate, for collectives
    network: float  # of the network rate
    launch_seconds: float  # host time of one kernel launch under PyTorch's autograd


CALIBRATION = Efficiency(
    matmul=0.72,  # cuBLAS bf16 on H100 at its sustained clock: 680 to 750 TFLOP/s of 989 on 8k products
    grouped_matmul=0.595,  # fitted to one published run, the Mixtral 8x7B row of docs/measurements/planning.md
    attention=0.50,  # cuDNN and FlashAttention-3 reach 500 to 600 TFLOP/s forward and 450 to 500 backward on H100
    memory=0.80,  # what STREAM-like kernels reach of HBM's rate
    nvlink=0.75,  # nccl-tests bus bandwidth: about 340 of 450 GB/s on H100
    network=0.85,
    launch_seconds=5e-6,
)

# Memory that no tensor of the model explains.
CONTEXT_BYTES = 2.5 * GIB  # CUDA context, cuBLAS and cuDNN workspaces, NCCL's buffers
FRAGMENTATION = 0.05  # of what the caching allocator hands out; expandable segments keep it near this
IMBALANCE = 1.25  # tokens of the busiest expert rank over the mean; a trained aux loss keeps it near this
