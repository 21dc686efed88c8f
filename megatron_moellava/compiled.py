"""Element-wise functions of which torch.compile makes one kernel, where a run asks for it (`training.compile`).

Spelt out, every operation in them reads its operands from the main memory, and in a small model costs as much to call as to
compute. The functions are the same either way; compiled, what lies between their first and last operation stays in fp32.
"""

import functools
from collections.abc import Callable

_on = False
_made: dict[Callable, Callable] = {}  # function -> compiled


def compile_elementwise(on: bool) -> None:
    """Whether functions marked `fusible`, Megatron-Core's own among them, are compiled from now on."""
    global _on
    _on = on


def compiles() -> bool:
    """What was last said."""
    return _on


def fusible(function: Callable | None = None, **_) -> Callable:
    """Mark a function of tensors. In place of Megatron-Core's `torch.compile` on a CPU, whose options are left out."""
    if function is None:
        return fusible

    @functools.wraps(function)
    def call(*arguments, **options):
        return _call_compiled(function, arguments, options) if _on else function(*arguments, **options)

    return call


def _call_compiled(function: Callable, arguments: tuple, options: dict):
    """One kernel for any number of rows and batches, but for one number of channels, which are the last axis.

    Where autograd does not look, nobody needs to know what requires a gradient; torch.compile would make a kernel for either
    case, and gives up after eight.
    """
    import torch

    if function not in _made:
        _made[function] = torch.compile(function)
    if not torch.is_grad_enabled():
        arguments = tuple(item.detach() if isinstance(item, torch.Tensor) else item for item in arguments)
    for item in arguments:
        for axis in range(item.dim() - 1 if isinstance(item, torch.Tensor) else 0):
            torch._dynamo.maybe_mark_dynamic(item, axis)
    return _made[function](*arguments, **options)
