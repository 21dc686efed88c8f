"""The model of a run on one rank."""

import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.model.build import build_model
from tests.helpers.inference_models import tiny_run


def test_one_stage_is_one_chunk_that_holds_everything(world):
    (model,) = build_model(tiny_run(MoEConfig()))
    assert model.pre_process and model.post_process
    assert len(model.language_model.decoder.layers) == model.backbone.num_layers
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_weights_depend_on_the_seed_alone():
    drawn = []
    for seed in (3, 3, 4):
        parallel.initialize(ParallelConfig(), seed)
        drawn.append(torch.cat([p.flatten() for p in build_model(tiny_run(MoEConfig()))[0].parameters()]))
    parallel.shutdown()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
