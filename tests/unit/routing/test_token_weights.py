"""The experts of every token of one pass."""

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.routing.token_weights import TokenWeights
from tests.helpers.batches import words
from tests.helpers.inference_models import tiny_run


@pytest.fixture
def model(world):
    return build_model(tiny_run(MoEConfig()))[0].eval()


@torch.no_grad()
def test_every_token_has_its_two_experts_in_every_layer(model):
    weights, batch = TokenWeights(model), words(2, 12)
    with weights.recording():
        model(**model_inputs(batch))
    assert list(weights.weights_TE) == weights.layers == [0, 2]
    for found_TE in weights.weights_TE.values():
        assert found_TE.shape == (24, 4) and found_TE.dtype == torch.float32
        assert ((found_TE > 0).sum(dim=1) <= 2).all()
        assert torch.allclose(found_TE.sum(dim=1)[:18], torch.ones(18), atol=1e-5)


@torch.no_grad()
def test_a_pass_replaces_the_one_before_and_nothing_is_kept_outside(model):
    weights = TokenWeights(model)
    with weights.recording():
        model(**model_inputs(words(2, 12)))
    first = weights.weights_TE
    model(**model_inputs(words(1, 8)))
    assert weights.weights_TE is first
    with weights.recording():
        model(**model_inputs(words(1, 8)))
    assert {len(found) for found in weights.weights_TE.values()} == {8}
