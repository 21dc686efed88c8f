"""Transformer Engine's delayed scales in a checkpoint, with modules that hold them as its modules do (tests/gpu has the real
ones)."""

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
