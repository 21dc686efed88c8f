"""The weights of every token of a forward pass, for a request's record and for an analysis."""

import torch

from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.routing.token_weights import TokenWeights
from tests.helpers.batches import words
from tests.helpers.inference_models import GATES, tiny_engine


@torch.no_grad()
def test_the_weights_of_the_last_recorded_pass_are_kept():
    model = tiny_engine(GATES["megatron"]).model
    weights, outputs = TokenWeights(model), []
    for router in weights.observer.routers.values():
        router.register_forward_hook(lambda router, inputs, output: outputs.append(output[0]))
    for length in (12, 9):
        with weights.recording():
            model(**(model_inputs(words(length=length)) | {"labels_BS": None}))
    model(**(model_inputs(words(length=5)) | {"labels_BS": None}))  # nobody records it
    assert weights.layers == list(weights.weights_TE) == [0, 2]
    for layer, output in zip(weights.layers, outputs[2:4], strict=True):
        assert torch.equal(weights.weights_TE[layer], output)
        assert weights.weights_TE[layer].shape == (2 * 9, 4)
