"""Transformer Engine's delayed scales in a checkpoint and over a skipped step, with modules that hold them as its modules do
(tests/gpu has the real ones)."""

from types import SimpleNamespace

import pytest
import torch

from megatron_moellava.model.fp8_engine import DIRECTIONS, EngineHistories, engine_histories


class Delayed(torch.nn.Module):
    """Scales and history of `fp8_meta`, which are there once a pass has been made or a checkpoint asks for them."""

    def __init__(self):
        super().__init__()
        self.fp8_meta: dict = {}

    def init_fp8_meta_tensors(self, recipe) -> None:
        assert self.fp8_meta["num_gemms"] == 1
        for direction in DIRECTIONS:
            self.fp8_meta[direction] = [torch.ones(3), torch.zeros(4, 3)]

    def get_fp8_meta_tensors(self) -> dict | None:
        if DIRECTIONS[0] not in self.fp8_meta:
            return None
        return {direction: [part.clone() for part in self.fp8_meta[direction]] for direction in DIRECTIONS}

    def reset_fp8_meta_tensors(self, kept: dict) -> None:
        for direction in DIRECTIONS:
            for part, value in zip(self.fp8_meta[direction], kept[direction], strict=True):
                part.copy_(value)


def trained() -> torch.nn.Module:
    """The first of two modules has made a pass."""
    model = torch.nn.Sequential(Delayed(), Delayed())
    model[0].fp8_meta = {"num_gemms": 1}
    model[0].init_fp8_meta_tensors(None)
    model[0].reset_fp8_meta_tensors({name: [torch.rand(3), torch.rand(4, 3)] for name in DIRECTIONS})
    return model


def test_a_resumed_run_has_the_scales_and_histories_of_before():
    model, fresh = trained(), torch.nn.Sequential(Delayed(), Delayed())
    state = EngineHistories([model], None).state()
    assert len(state) == 8
    EngineHistories([fresh], None).load_state(state)
    for name in DIRECTIONS:
        assert all(map(torch.equal, fresh[0].fp8_meta[name], model[0].fp8_meta[name]))
    assert not fresh[1].fp8_meta, "what had none has none"


def test_what_the_emulation_left_is_not_taken_for_scales():
    fresh = torch.nn.Sequential(Delayed(), Delayed())
    EngineHistories([fresh], None).load_state([torch.zeros(4, 2, 1)] * 3)
    assert not fresh[0].fp8_meta and not fresh[1].fp8_meta


def test_only_the_delayed_recipe_remembers():
    assert engine_histories([trained()], "tensorwise", None) is None
    assert isinstance(engine_histories([trained()], "delayed", None), EngineHistories)


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


def step(model: torch.nn.Module, histories: EngineHistories, largest: float) -> None:
    histories.keep()
    model(torch.full((1, 2), largest))


def test_what_a_skipped_step_has_moved_is_brought_back_in_place():
    model = torch.nn.Sequential(DelayedLinear(), DelayedLinear())
    histories = EngineHistories([model], None)
    step(model, histories, 1.0)
    step(model, histories, 3.0)
    held, before = tensors(model), [part.clone() for part in tensors(model)]
    step(model, histories, float("inf"))
    assert not any(torch.equal(now, then) for now, then in zip(tensors(model), before, strict=True))
    histories.forget()
    for here, now, then in zip(held, tensors(model), before, strict=True):
        assert here is now and torch.equal(now, then)


def test_histories_that_the_skipped_step_made_begin_anew():
    model = torch.nn.Sequential(DelayedLinear())
    histories = EngineHistories([model], None)
    step(model, histories, float("nan"))
    histories.forget()
    assert [part.unique().tolist() for part in tensors(model)] == [[0.0], [1.0]] * 2


@pytest.mark.parametrize("layer", [torch.nn.Linear(2, 2), DelayedLinear("blockwise")])
def test_recipes_that_look_back_at_nothing_have_nothing_to_keep(layer):
    model = torch.nn.Sequential(layer)
    histories = EngineHistories([model], None)
    step(model, histories, float("inf"))
    step(model, histories, 1.0)
    histories.forget()
    assert histories.kept == {}
