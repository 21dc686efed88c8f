"""A run that trains nothing, or less than it was told to, says so in its first step."""

import pytest
import torch

from megatron_moellava.config import ConfigError
from megatron_moellava.model.configuration import RECOMPUTE
from megatron_moellava.training.first_gradients import NothingTrains
from tests.helpers.trainers import one_layout, started, state


@pytest.fixture(scope="module", autouse=True)
def _one_layout():
    with one_layout():
        yield


@pytest.mark.parametrize("recompute", list(RECOMPUTE))
def test_a_run_whose_trained_roles_receive_no_gradient_stops_at_its_first_step(recompute):
    trainer = started(("experts", "router"), **{"training.recompute": recompute})
    trainer.chunks[0].language_model.decoder.register_forward_hook(lambda decoder, inputs, output: output.detach())
    before = state(trainer)
    with pytest.raises(NothingTrains, match="experts, router received no gradient in the first step"):
        trainer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items() if "local_" not in name)


def test_a_role_without_a_gradient_is_named_beside_those_that_have_one():
    trainer = started(("experts", "language.norm"))
    last = trainer.chunks[0].language_model.decoder.layers[-1]  # only the final norm comes after it
    last.register_forward_hook(lambda layer, inputs, output: (output[0].detach(), *output[1:]))
    with pytest.raises(NothingTrains, match=r"experts received no gradient .* trained are language.norm"):
        trainer.step()


def test_text_rows_alone_are_a_gradient_of_zero_and_not_a_missing_one():
    trainer = started(("projector",), rows="text")
    numbers, applied, _ = trainer.step()
    assert applied and numbers["grad_norm"] == 0.0


def test_a_run_that_has_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="experts, router: this model has no such parameters"):
        started(("experts", "router"), moe=None)
