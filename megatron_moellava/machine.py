"""What a machine has, told without importing torch: for checks that must answer at once, also on a login node.

`platform.py` knows for certain, once torch is there.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What some settings need."""

    has_gpu: bool
    has_transformer_engine: bool
    has_gradient_fusion: bool  # apex's kernel that adds weight gradients inside of the product


GPU_CLUSTER = Machine(
    has_gpu=True, has_transformer_engine=True, has_gradient_fusion=True
)  # what plans are made for, wherever they are made


def this_machine(device: str = "auto") -> Machine:
    """This machine as a run with `training.device` will find it; "cuda" says that it will run on GPUs elsewhere."""
    if device == "cuda":
        return GPU_CLUSTER
    has_gpu = device == "auto" and _sees_gpus()
    has_engine = has_gpu and importlib.util.find_spec("transformer_engine") is not None
    has_fusion = has_engine and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return Machine(has_gpu=has_gpu, has_transformer_engine=has_engine, has_gradient_fusion=has_fusion)


def _sees_gpus() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/proc/driver/nvidia/gpus").glob("*"))
