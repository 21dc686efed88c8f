"""What pictures cost beside text, against the FLOPs that costs/flops.py counts."""

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_moellava.costs.balance import tower_weight
from megatron_moellava.costs.flops import Attention, layer_work, tower_layers_work, useful_flops
from megatron_moellava.costs.sharding import Sharding
from megatron_moellava.towers import tower_of_run


@pytest.mark.parametrize("stage, trains", [(2, None), (3, None), (2, ("tower", "projector", "language.attention"))])
def test_the_weight_is_the_ratio_of_the_flops(stage, trains):
    run = RunConfig(
        model=ModelConfig(backbone="phi-2", tower="siglip2-so400m-patch16-naflex"),
        training=TrainingConfig(stage=stage, trains=trains, precision="bf16"),
        data=DataConfig(seq_length=2048),
    )
    backbone, tower = get_backbone("phi-2"), tower_of_run(run)
    sharding = Sharding(run=run, backbone=backbone, tower=tower)
    vision = sum(useful_flops(work) for work in tower_layers_work(sharding, 1.0))
    attention = next(work for work in layer_work(sharding, False, 2048, 2048) if isinstance(work, Attention))
    text = useful_flops(attention) * backbone.num_layers
    expected = (vision / tower.work(tower.num_patches)) / (text / 2048**2)
    assert tower_weight(run, backbone, tower) == pytest.approx(expected, rel=1e-6)
