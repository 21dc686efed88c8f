"""Element-wise functions of which torch.compile makes one kernel, where a run asks for it (`training.compile`).

Spelt out, every operation in them reads its operands from the main memory, and in a small model costs as much to call as to
compute. The functions are the same either way; compiled, what lies between their first and last operation stays in fp32.
"""

import functools
from collections.abc import Callable

_state = {"on": False}


def compile_elementwise(on: bool) -> None:
    """Whether functions marked `fusible`, Megatron-Core's own among them, are compiled from now on."""
    _state["on"] = on


def compiles() -> bool:
    """What was last said."""
    return _state["on"]


def fusible(function: Callable | None = None, **_) -> Callable:
    """Mark a function of tensors. In place of Megatron-Core's `torch.compile` on a CPU, whose options are left out."""
    if function is None:
        return fusible

    @functools.cache
    def compiled() -> Callable:
        import torch

        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(*arguments, **options):
        return (compiled() if _state["on"] else function)(*arguments, **options)

    return call
