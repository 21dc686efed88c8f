"""A batch as the arguments of the model."""

import inspect

from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.moe_llava import MoELlava
from tests.helpers.batches import words


def test_every_argument_is_one_of_the_models_and_the_batchs_own_tensor():
    batch = words()
    arguments = model_inputs(batch)
    assert arguments.keys() <= inspect.signature(MoELlava.forward).parameters.keys()
    assert arguments["tokens_BS"] is batch.tokens_BS and arguments["labels_BS"] is batch.labels_BS
    assert arguments["pixels_NCHW"] is batch.pixel_values_NCHW
    assert (arguments["cu_seqlens"], arguments["max_seqlen"]) == (None, 12)
