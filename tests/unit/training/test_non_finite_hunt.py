"""Where a number stops being finite is named by module, in the forward and in the backward pass."""

import pytest
import torch

from megatron_moellava.training.loop import TrainingDiverged
from tests.helpers.trainers import one_layout, started

HUNT = {"training.debug.find_non_finite": True, "training.non_finite_patience": 1}
LAYER = "language_model.decoder.layers.1"


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def said(trainer, capsys) -> str:
    trainer.train_steps = trainer.state.iteration + 1
    with pytest.raises(TrainingDiverged):
        trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " skipped: " in line]
    return line


def test_a_weight_that_is_no_number_is_named(capsys):
    trainer = started(("experts", "router"), **HUNT)
    norm = trainer.chunks[0].get_submodule(f"{LAYER}.pre_mlp_layernorm")
    with torch.no_grad():
        norm.weight[0] = float("nan")
    line = said(trainer, capsys)
    assert "the loss of rank 0 is not finite" in line
    assert f"not finite first: rank 0: the output of {LAYER}.pre_mlp_layernorm (its weight is not)" in line


def test_an_overflow_is_named_with_what_went_in(capsys):
    trainer = started(("experts", "router"), **HUNT)
    product = trainer.chunks[0].get_submodule(f"{LAYER}.self_attention.linear_proj")
    with torch.no_grad():
        product.weight.fill_(1e38)
    line = said(trainer, capsys)
    assert f"the output of {LAYER}.self_attention.linear_proj (what it was given is, up to " in line


def test_a_gradient_is_named_where_the_loss_is_finite(capsys):
    trainer = started(("language.attention",), **HUNT)
    attention = trainer.chunks[0].get_submodule(f"{LAYER}.self_attention.core_attention")
    attention.register_forward_hook(lambda module, inputs, output: _Poison.apply(output))
    line = said(trainer, capsys)
    assert "the gradient of rank 0 is not finite" in line
    assert f"not finite first: rank 0: the gradient that reaches the output of {LAYER}." in line


def test_nothing_is_watched_unless_it_is_asked_for():
    trainer = started(("experts",))
    assert trainer.non_finite_hunt is None
    watched = started(("experts",), **HUNT)
    modules = [module for _, module in watched.non_finite_hunt.modules]
    hooks = [len(module._forward_hooks) for module in modules]
    assert watched.step()[1]
    assert [len(module._forward_hooks) for module in modules] == hooks


class _Poison(torch.autograd.Function):
    """The same, with a gradient that is no number."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.full_like(gradient, float("nan"))
