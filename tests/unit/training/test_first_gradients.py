"""A run whose trained roles get no gradient stops in its first step; test_trained_roles.py has all combinations."""

import pytest
import torch

from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.configuration import RECOMPUTE
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.roles import freeze
from megatron_moellava.training.first_gradients import FirstGradients, NothingTrains, require_trained
from tests.helpers.batches import words
from tests.helpers.inference_models import tiny_run
from tests.helpers.trainers import one_layout, started, state


def test_roles_that_a_model_does_not_have_are_refused_before_the_first_step(world):
    (model,) = build_model(tiny_run())
    with pytest.raises(ConfigError, match=r"training\.trains=experts: this model has no such parameters"):
        require_trained(freeze(model, ("experts",)), ("experts",))
    require_trained(freeze(model, ("projector",)), ("projector",))


def test_a_gradient_of_zero_has_been_received(world):
    """Text rows give the projector a gradient that is zero."""
    (model,) = build_model(tiny_run())
    freeze(model, ("projector",))
    first = FirstGradients([model])
    model(**model_inputs(words())).sum().backward()
    assert not any(p.grad.any() for p in model.projector.parameters())
    first.check()


def test_a_role_that_receives_nothing_is_named_beside_those_that_do(world):
    (model,) = build_model(tiny_run(MoEConfig()))
    freeze(model, ("projector", "router"))
    first = FirstGradients([model])
    model.projector(torch.zeros(1, 1, model.tower.hidden_size)).sum().backward()
    with pytest.raises(NothingTrains, match=r"router received no gradient in the first step.*trained are projector"):
        first.check()
    assert not model.projector.linear_fc1.weight._post_accumulate_grad_hooks, "nobody listens any more"


@pytest.fixture(scope="module")
def _trainers():
    with one_layout():
        yield


@pytest.mark.usefixtures("_trainers")
@pytest.mark.parametrize("recompute", list(RECOMPUTE))
def test_a_run_whose_trained_roles_receive_no_gradient_stops_at_its_first_step(recompute):
    trainer = started(("experts", "router"), **{"training.recompute": recompute})
    trainer.chunks[0].language_model.decoder.register_forward_hook(lambda decoder, inputs, output: output.detach())
    before = state(trainer)
    with pytest.raises(NothingTrains, match="experts, router received no gradient in the first step"):
        trainer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items() if "local_" not in name)
