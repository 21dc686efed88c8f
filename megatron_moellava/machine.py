"""What a machine has, told without importing torch: for checks that must answer at once, also on a login node.

`platform.py` knows for certain, once torch is there; it obeys what `choose` leaves in the environment.
"""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
TransformerImpl = Literal["auto", "local", "transformer_engine"]  # Megatron's --transformer-impl, and what is there

TRANSFORMER_IMPL = "MOELLAVA_TRANSFORMER_IMPL"  # environment variable, read when `platform` is imported
DEVICE = "MOELLAVA_DEVICE"  # likewise
# torch's caching allocator, read once torch is loaded: rows of changing lengths leave blocks of every size otherwise.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")

COMPILER = os.environ.get("CXX", "g++")  # the one that torch.compile takes

AMPERE = (8, 0)  # compute capability from which a GPU multiplies in bf16
BEFORE_AMPERE = "fp16"  # what `auto` takes there
# Of /proc/cpuinfo: x86 (AVX-512's dot product, AMX's tiles), and Arm.
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Variables that hold torch's own kernels and oneDNN, which multiplies for torch, to older instructions -> the values that
# leave no bf16. With torch's own held to AVX2 and oneDNN free, torch 2.14's attention in bf16 even raises.
_BEFORE_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
HELD_BACK_BY = {
    "ATEN_CPU_CAPABILITY": ("DEFAULT", "AVX2"),
    "ONEDNN_MAX_CPU_ISA": _BEFORE_BF16,
    "DNNL_MAX_CPU_ISA": _BEFORE_BF16,
}
SLOWER_WITHOUT_UNITS = "a step takes about 7 times as long as in fp32"  # make bench BENCH=quickstart


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What some settings need. None: not known here."""

    has_gpu: bool
    has_transformer_engine: bool
    has_gradient_fusion: bool = False  # apex's kernel that adds weight gradients inside of the product
    has_deep_ep: bool | None = None
    has_compiler: bool = True  # that torch.compile needs for the CPU
    compute_capability: tuple[int, int] | None = None  # of the GPU: (9, 0) is Hopper, (10, 0) Blackwell


GPU_CLUSTER = Machine(
    has_gpu=True, has_transformer_engine=True, has_gradient_fusion=True
)  # what plans are made for, wherever they are made


def choose(device: Device = "auto", transformer_impl: TransformerImpl = "auto") -> None:
    """Which device and modules this process and those it starts use; "auto" leaves it at what has been said before.

    Must be called before torch is imported.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's older name: the user's own choice
        os.environ.setdefault(*ALLOCATOR)
    if device != "auto":
        os.environ[DEVICE] = device
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if transformer_impl != "auto":
        os.environ[TRANSFORMER_IMPL] = transformer_impl


def this_machine(device: Device = "auto", transformer_impl: TransformerImpl = "auto") -> Machine:
    """This machine as a run with these settings will find it; device "cuda" says that it will run on GPUs elsewhere."""
    if device == "cuda":
        return GPU_CLUSTER
    has_gpu = device == "auto" and sees_gpus()
    has_engine = has_gpu and transformer_impl != "local" and engine_found() == "whole"
    return Machine(
        has_gpu=has_gpu,
        has_transformer_engine=has_engine,
        has_gradient_fusion=has_engine and is_installed("fused_weight_gradient_mlp_cuda"),
        has_deep_ep=is_installed("deep_ep"),
        has_compiler=has_gpu or shutil.which(COMPILER) is not None,
    )


def sees_gpus() -> bool:
    """Whether the system has a GPU for this process, whatever torch makes of it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*"))


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words; empty where /proc/cpuinfo does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return frozenset(next(named, "").split())


def without_bf16_units(flags: frozenset[str], environment: Mapping[str, str]) -> str:
    """Why a processor with these flags does not multiply in bf16; empty: it does."""
    if not flags & BF16_FLAGS:
        return "this processor has no bf16 units (AVX-512 bf16 or AMX)"
    for name, values in HELD_BACK_BY.items():
        if environment.get(name, "").upper() in values:
            return f"{name}={environment[name]} keeps the processor from its bf16 units"
    return ""


def fastest_precision(
    machine: Machine, flags: frozenset[str] | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[str, str]:
    """(precision, reason): what `training.precision=auto` stands for. `flags`: of the processor; None: of this one."""
    if machine.has_gpu:
        capability = machine.compute_capability
        if capability is not None and capability < AMPERE:
            return (
                BEFORE_AMPERE,
                f"a GPU of compute capability {capability[0]}.{capability[1]} does not multiply in bf16",
            )
        return "bf16", "GPU"
    missing = without_bf16_units(cpu_flags() if flags is None else flags, environment)
    return ("fp32", missing) if missing else ("bf16", "this processor has bf16 units")


def slowness(precision: str, machine: Machine) -> str:
    """A warning where `precision` is the slow choice on this machine; else empty."""
    fastest, reason = fastest_precision(machine)
    if precision != "bf16" or fastest == "bf16":
        return ""
    return f"warning: precision bf16, but {reason}: {SLOWER_WITHOUT_UNITS}; precision fp32 or auto avoids that"


def is_installed(module: str) -> bool:
    """Whether `module` could be imported, found out without importing it."""
    return importlib.util.find_spec(module) is not None


def installed_version(package: str) -> str | None:
    """Of a package by its name in the index; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine_found() -> Literal["none", "half", "whole"]:
    """Transformer Engine: "half" is its library without the extension for torch, which a failed build leaves behind.

    Importing it then raises FileNotFoundError, and so does megatron.core, which expects ImportError.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        return "none"
    folders = [Path(folder) / "wheel_lib" for folder in spec.submodule_search_locations or ()]
    has_extension = any(any(folder.glob("transformer_engine_torch*.so")) for folder in folders)
    return "whole" if has_extension or is_installed("transformer_engine_torch") else "half"
