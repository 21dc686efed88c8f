"""What Transformer Engine's delayed FP8 remembers from step to step, for checkpoints: each product's scales and amax history.

Transformer Engine itself keeps them in a pickle beside the weights ("extra state") and refuses to read one back. Here they
are plain tensors of the rank, as those of the emulation on a CPU are (`fp8_emulation.py`), and a resumed run rounds as it
would have.
"""

import itertools

import torch

from megatron_moellava.model.configuration import FP8_RECIPES

from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

DIRECTIONS = ("scaling_fwd", "scaling_bwd")  # keys of a module's `fp8_meta`


class EngineHistories:
    """Of all modules of this rank, in the order of the model. Transformer Engine moves them on by itself."""

    def __init__(self, chunks: list, config: TransformerConfig):
        self.config = config
        self.modules = [
            module for chunk in chunks for module in chunk.modules() if hasattr(module, "reset_fp8_meta_tensors")
        ]

    def advance(self) -> None:
        """After an optimizer step: nothing is left to do."""

    def forget(self) -> None:
        """After a step that was skipped: training/fp8_histories.py has brought back what it moved."""

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
