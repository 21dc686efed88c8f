"""Transformer Engine's histories over a skipped step, with modules that hold theirs as Transformer Engine's do."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moellava.training.fp8_histories import DIRECTIONS, Fp8Histories

HISTORY, OPERANDS = 4, 3


class DelayedLinear(torch.nn.Linear):
    """A linear layer with Transformer Engine's `fp8_meta`: filled in the first pass, then moved in place."""

    def __init__(self, recipe: str = "delayed"):
        super().__init__(2, 2)
        self.fp8_meta: dict = {}
        self.recipe = recipe

    def forward(self, x):
        for direction in DIRECTIONS if self.recipe == "delayed" else ():
            if direction not in self.fp8_meta:
                history, scale = torch.zeros(HISTORY, OPERANDS), torch.ones(OPERANDS)
                self.fp8_meta[direction] = SimpleNamespace(amax_history=history, scale=scale)
            state = self.fp8_meta[direction]
            state.amax_history.copy_(state.amax_history.roll(1, 0))
            state.amax_history[0] = x.abs().max()
            state.scale.copy_(448 / state.amax_history.amax(0))
        if self.recipe == "blockwise":
            self.fp8_meta = dict.fromkeys(DIRECTIONS, SimpleNamespace(scale=None))
        return super().forward(x)


def tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    states = [layer.fp8_meta[direction] for layer in model for direction in DIRECTIONS]
    return [part for state in states for part in (state.amax_history, state.scale)]


def step(model: torch.nn.Module, histories: Fp8Histories, largest: float) -> None:
    histories.keep()
    model(torch.full((1, 2), largest))


def test_what_a_skipped_step_has_moved_is_brought_back_in_place():
    model = torch.nn.Sequential(DelayedLinear(), DelayedLinear())
    histories = Fp8Histories([model])
    step(model, histories, 1.0)
    step(model, histories, 3.0)
    held, before = tensors(model), [part.clone() for part in tensors(model)]
    step(model, histories, float("inf"))
    assert not any(torch.equal(now, then) for now, then in zip(tensors(model), before, strict=True))
    histories.restore()
    for here, now, then in zip(held, tensors(model), before, strict=True):
        assert here is now and torch.equal(now, then)


def test_histories_that_the_skipped_step_made_begin_anew():
    model = torch.nn.Sequential(DelayedLinear())
    histories = Fp8Histories([model])
    step(model, histories, float("nan"))
    histories.restore()
    assert [part.unique().tolist() for part in tensors(model)] == [[0.0], [1.0]] * 2


@pytest.mark.parametrize("layer", [torch.nn.Linear(2, 2), DelayedLinear("blockwise")])
def test_recipes_that_look_back_at_nothing_have_nothing_to_keep(layer):
    model = torch.nn.Sequential(layer)
    histories = Fp8Histories([model])
    step(model, histories, float("inf"))
    step(model, histories, 1.0)
    histories.restore()
    assert histories.kept == {}
