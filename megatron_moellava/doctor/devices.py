"""What computes and what communicates: GPUs, modules, precision, and a product and a reduction to prove it. Imports torch."""

import os
import tempfile
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from megatron_moellava import platform
from megatron_moellava.config import ConfigError
from megatron_moellava.doctor.findings import Finding
from megatron_moellava.machine import SLOWER_WITHOUT_UNITS, fastest_precision, sees_gpus

COMPUTE, ENVIRONMENT = "compute", "environment"
_GIB = 1 << 30
# Variables that change what a run does, by how their names begin.
TELLING = ("CUDA_", "NCCL_", "GLOO_", "NVTE_", "OMP_", "MKL_", "PYTORCH_", "TORCH_", "MOELLAVA_", "SLURM_JOB_ID",
           "MASTER_", "WORLD_SIZE", "ATEN_", "ONEDNN_", "DNNL_")  # fmt: skip


def compute() -> Iterator[Finding]:
    """The devices of a run, and whether they work."""
    yield from gpus()
    try:
        machine = platform.machine()
    except ConfigError as error:
        yield Finding(part=COMPUTE, name="choice of device", found="refused", meaning=str(error), level="problem")
        return
    yield Finding(part=COMPUTE, name="modules", found=platform.engine_sentence())
    precision, reason = fastest_precision(machine)
    yield Finding(
        part=COMPUTE,
        name="precision",
        found=f"auto is {precision}",
        meaning=f"{reason}; in bf16 {SLOWER_WITHOUT_UNITS}" if precision == "fp32" else reason,
    )
    yield product(precision)
    yield reduction()


def gpus() -> Iterator[Finding]:
    """Each GPU, or why there is none."""
    found = platform.gpus()
    for number, (name, memory, capability) in enumerate(found):
        yield Finding(
            part=COMPUTE,
            name=f"GPU {number}",
            found=f"{name}, {memory / _GIB:.0f} GiB, compute capability {capability[0]}.{capability[1]}",
        )
    if found:
        text = f"CUDA {torch.version.cuda}, NCCL {platform.nccl_version()}"
        yield Finding(part=COMPUTE, name="CUDA", found=text)
    elif sees_gpus():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "its driver may be too old"
        meaning = f"the system has a GPU that torch {torch.__version__} does not see: {why}; runs compute on the CPU"
        yield Finding(part=COMPUTE, name="GPU", found="not usable", meaning=meaning, level="note")
    else:
        meaning = "runs compute on the CPU, by gloo between processes; training.device=cuda is refused"
        yield Finding(part=COMPUTE, name="GPU", found="none", meaning=meaning)


def product(precision: str) -> Finding:
    """A matrix product on the device, in the precision that `auto` stands for."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    try:
        ones = torch.ones(64, 64, dtype=dtype, device=platform.device())
        value = float((ones @ ones).float().mean())
    except RuntimeError as error:
        return Finding(part=COMPUTE, name="a product", found="fails", meaning=_first_line(error), level="problem")
    right = value == 64.0
    found = f"right, in {precision} on {platform.device()}" if right else f"wrong: {value} instead of 64"
    return Finding(part=COMPUTE, name="a product", found=found, level="ok" if right else "problem")


def reduction() -> Finding:
    """A process group of this process alone: it must find the network's interface, and NCCL the driver."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            store = dist.FileStore(file.name, 1)
            dist.init_process_group(platform.BACKEND, store=store, rank=0, world_size=1)
            value = torch.ones(1, device=platform.device())
            dist.all_reduce(value)
            dist.destroy_process_group()
    except (RuntimeError, ValueError) as error:
        meaning = f"{_first_line(error)}; try GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME with an interface of `ip link`"
        return Finding(part=COMPUTE, name="a reduction", found="fails", meaning=meaning, level="problem")
    return Finding(part=COMPUTE, name="a reduction", found=f"works, by {platform.BACKEND}")


def environment(variables: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that change what a run does."""
    for name in sorted(variables):
        if name.startswith(TELLING):
            yield Finding(part=ENVIRONMENT, name=name, found=variables[name] or "(empty)")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
