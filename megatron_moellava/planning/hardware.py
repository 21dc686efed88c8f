"""The efficiencies that turn a GPU's data sheet (`costs/gpus.py`) into a prediction.

Nothing here was measured by this project: constants whose origin stands beside them. The only number that was fitted is
`CALIBRATION` (docs/measurements/planning.md says to which run).
"""

from dataclasses import dataclass

from megatron_moellava.costs.gpus import GIB


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
