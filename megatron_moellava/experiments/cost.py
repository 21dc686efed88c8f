"""What a token costs in a trained model: beside every comparison, so that a reader sees which are at equal computation."""

from dataclasses import replace

from megatron_moellava.backbones.backbone import Backbone
from megatron_moellava.config import ParallelConfig, RunConfig
from megatron_moellava.conversion.inspection import count_parameters
from megatron_moellava.costs.flops import forward_flops, last_stage_work
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.shapes import model_of_run
from megatron_moellava.costs.stage_work import decoder_work
from megatron_moellava.towers.tower import Tower

TEXT_LENGTH = 256  # tokens that a token attends to, picture included


def cost_of(run: RunConfig, backbone: Backbone, tower: Tower, length: float = TEXT_LENGTH) -> dict:
    """{"flops_per_token": forward, decoder and output layer; "activated", "total": parameters of the language model}.

    `length`: of a sample, in tokens: how far attention reaches back.
    """
    whole = replace(run, parallel=ParallelConfig())
    layout = Layout(run=whole, backbone=backbone, tower=tower, world_size=1)
    work = [*decoder_work(layout, 0, 1.0, length), *last_stage_work(layout, 1.0)]
    counted = count_parameters(model_of_run(run, backbone, tower))
    return {
        "flops_per_token": sum(map(forward_flops, work)),
        "activated": counted.activated,
        "total": counted.total,
    }
