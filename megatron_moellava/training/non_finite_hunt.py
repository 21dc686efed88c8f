"""`training.debug.find_non_finite`: in which module a number stops being finite, in the forward and in the backward pass.

Every module's output is looked at as soon as it is there, and the gradient of every output as soon as it is known, so the
first find is where it began: a sum of a module that got finite numbers, or what came in from outside. Each look waits for
the device; hooks exist only in runs that ask for them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist

from megatron_moellava.model.moe_llava import MoELlava


class NonFiniteHunt:
    """What this rank finds first in a step."""

    def __init__(self, chunks: Sequence[MoELlava]):
        self.modules = [
            (name if len(chunks) == 1 else f"chunk {number}: {name}", module)
            for number, chunk in enumerate(chunks)
            for name, module in chunk.named_modules()
            if name
        ]
        self.forward, self.backward = "", ""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context of a step's forward and backward passes; forgets the step before."""
        self.forward, self.backward = "", ""
        hooks = [module.register_forward_hook(partial(self._after, name)) for name, module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _after(self, name: str, module: torch.nn.Module, inputs, output) -> None:
        for tensor in _floats(output):
            if not self.forward and not bool(torch.isfinite(tensor).all()):
                self.forward = f"the output of {name} ({_why(module, inputs)})"
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, name))

    def _gradient(self, name: str, gradient: torch.Tensor) -> None:
        if not self.backward and not bool(torch.isfinite(gradient).all()):
            self.backward = f"the gradient that reaches the output of {name}"

    def found(self) -> str:
        """`; not finite first: rank 1: the output of ...`, of all ranks that found something; collective."""
        finds: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(finds, self.forward or self.backward)
        named = [f"rank {rank}: {find}" for rank, find in enumerate(finds) if find]
        return f"; not finite first: {'; '.join(named) or 'a gradient of a weight, behind finite ones of all outputs'}"


def _why(module: torch.nn.Module, inputs) -> str:
    """What the module was given, and what it has."""
    wrong = [name for name, value in module.named_parameters() if not bool(torch.isfinite(value).all())]
    if wrong:
        return f"its {', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} not"
    given = list(_floats(inputs))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in given):
        return "what it was given is not either"
    largest = max((float(tensor.detach().abs().max()) for tensor in given if tensor.numel()), default=0.0)
    return f"what it was given is, up to {largest:.3g}"


def _floats(values) -> Iterator[torch.Tensor]:
    """The floating-point tensors in what a module takes or gives."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        yield from _floats(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _floats(value)
