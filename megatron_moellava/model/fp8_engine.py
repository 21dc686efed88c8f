"""What Transformer Engine's delayed FP8 remembers from step to step, for checkpoints: each product's scales and amax history.

Transformer Engine itself keeps them in a pickle beside the weights ("extra state") and refuses to read one back. Here they
are plain tensors of the rank, as those of the emulation on a CPU are (`fp8_emulation.py`), and a resumed run rounds as it
would have. It moves them while a step is computed, so they are kept before each step and brought back when the step is
skipped: an infinity in a history of 1,024 steps would set the scale of a thousand more.
"""

import itertools
from collections.abc import Iterator

import torch

from megatron_moellava.model.configuration import FP8_RECIPES

from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

DIRECTIONS = ("scaling_fwd", "scaling_bwd")  # keys of a module's `fp8_meta`
PARTS = {"amax_history": 0.0, "scale": 1.0}  # what a direction has, and how Transformer Engine begins


class EngineHistories:
    """Of all modules of this rank, in the order of the model. Transformer Engine moves them on by itself."""

    def __init__(self, chunks: list, config: TransformerConfig):
        self.config = config
        self.modules: list = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")]
        self.kept: dict[tuple[int, str, str], torch.Tensor] = {}

    def _tensors(self) -> Iterator[tuple[tuple[int, str, str], torch.Tensor]]:
        for number, module in enumerate(self.modules):
            for direction in DIRECTIONS:
                state = module.fp8_meta.get(direction)
                if hasattr(state, "amax_history"):
                    yield from (((number, direction, part), getattr(state, part)) for part in PARTS)

    def keep(self) -> None:
        """Before a step: remember them as they are; copies on the device, without waiting for it."""
        now = dict(self._tensors())
        if self.kept.keys() != now.keys():  # they come into being in a module's first pass
            self.kept = {key: torch.empty_like(tensor) for key, tensor in now.items()}
        if now:
            torch._foreach_copy_([self.kept[key] for key in now], list(now.values()))

    def advance(self) -> None:
        """After an optimizer step: nothing is left to do."""

    def forget(self) -> None:
        """Bring back what was kept last, in place: Transformer Engine holds on to its tensors. What is newer begins anew."""
        for key, tensor in self._tensors():
            if key in self.kept:
                tensor.copy_(self.kept[key])
            else:
                tensor.fill_(PARTS[key[2]])

    def state(self) -> list[torch.Tensor]:
        """For a checkpoint of this rank: scales and history of both directions of each module, empty where it has none."""
        kept = []
        for module in self.modules:
            found = module.get_fp8_meta_tensors() or {}
            for direction in DIRECTIONS:
                kept += [item.cpu() for item in found.get(direction, (torch.empty(0), torch.empty(0)))]
        return kept

    def load_state(self, state: list[torch.Tensor]) -> None:
        """Take over what a checkpoint holds; the inverse of `state`. What the emulation has left says nothing here."""
        if len(state) != 4 * len(self.modules):
            return
        recipe, parts = get_fp8_recipe(self.config), itertools.batched(state, 4)
        for module, (forward, history, backward, grad_history) in zip(self.modules, parts, strict=True):
            if not forward.numel():
                continue
            module.fp8_meta["num_gemms"] = getattr(module, "num_gemms", 1)
            module.init_fp8_meta_tensors(recipe)
            kept = dict(zip(DIRECTIONS, ((forward, history), (backward, grad_history)), strict=True))
            module.reset_fp8_meta_tensors(kept)


def engine_histories(chunks: list, recipe: str, config: TransformerConfig) -> EngineHistories | None:
    """None for a recipe that remembers nothing."""
    return EngineHistories(chunks, config) if FP8_RECIPES[recipe].history else None
