"""Transformer Engine's amax histories and scales (delayed scaling), which it moves while a step is computed.

They are kept before each step and brought back when the step is skipped, as weights and moments are: an infinity in a
history of 1,024 steps would set the scale of a thousand more. FP8 that is emulated keeps its own (model/fp8_emulation.py).
"""

from collections.abc import Iterator, Sequence

import torch

from megatron_moellava.model.fp8_engine import DIRECTIONS

PARTS = {"amax_history": 0.0, "scale": 1.0}  # what a direction has, and how Transformer Engine begins


class Fp8Histories:
    """Of all modules of this rank's `chunks` that have any; nothing on a CPU and under the other recipes."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self.metas: list = [
            module.fp8_meta for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")
        ]
        self.kept: dict[tuple[int, str, str], torch.Tensor] = {}

    def _tensors(self) -> Iterator[tuple[tuple[int, str, str], torch.Tensor]]:
        for number, meta in enumerate(self.metas):
            for direction in DIRECTIONS:
                if hasattr(
                    state := meta.get(direction), "amax_history"
                ):  # delayed scaling; the others look back at nothing
                    yield from (((number, direction, part), getattr(state, part)) for part in PARTS)

    def keep(self) -> None:
        """Remember them as they are; copies on the device, without waiting for it."""
        now = dict(self._tensors())
        if self.kept.keys() != now.keys():  # they come into being in a module's first pass
            self.kept = {key: torch.empty_like(tensor) for key, tensor in now.items()}
        if now:
            torch._foreach_copy_([self.kept[key] for key in now], list(now.values()))

    def restore(self) -> None:
        """Bring back what was kept last, in place: Transformer Engine holds on to its tensors. What is newer begins anew."""
        for key, tensor in self._tensors():
            if key in self.kept:
                tensor.copy_(self.kept[key])
            else:
                tensor.fill_(PARTS[key[2]])
