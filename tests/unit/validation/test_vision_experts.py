"""What experts of the tower and the projector need."""

import pytest

from megatron_moellava.config import ProjectorMoEConfig, TowerMoEConfig, load_config
from tests.helpers.paths import REPO
from tests.helpers.runs import problems

LAYOUT = "parallel__expert_model_parallel_size"


@pytest.mark.parametrize(
    ("world", "fields", "message"),
    [
        (1, {"tower_moe__num_moe_experts": 0}, "tower_moe.num_moe_experts=0 must be at least 1"),
        (1, {"projector_moe__moe_z_loss_coeff": -1.0}, "projector_moe.moe_z_loss_coeff=-1.0 must be 0 or more"),
        (1, {"tower_moe__moe_router_topk": 5}, "tower_moe.moe_router_topk=5 must lie between 1 and tower_moe.num_moe"),
        (1, {"tower_moe__placement": [9]}, "tower_moe.placement=[9] must name different layers between 0 and 1"),
        (1, {"projector_moe__normalize_top1": True}, "the weights of several experts sum to 1 anyway"),
        (2, {"projector_moe__num_moe_experts": 3, LAYOUT: 2}, "does not divide projector_moe.num_moe_experts=3"),
        (
            2,
            {
                "projector_moe__num_moe_experts": 4,
                "parallel__tensor_model_parallel_size": 2,
                "parallel__expert_tensor_parallel_size": 2,
            },
            "parallel.expert_tensor_parallel_size=2: the experts of projector_moe have biases",
        ),
        (
            2,
            {
                "tower_moe__num_moe_experts": 4,
                "parallel__tensor_model_parallel_size": 2,
                "parallel__sequence_parallel": False,
            },
            "parallel.sequence_parallel=false with tower_moe",
        ),
        (
            1,
            {"projector_moe__num_moe_experts": 4, "training__lora.targets": ["projector"]},
            "training.lora.targets has projector, whose experts (projector_moe) get no adapters",
        ),
        (
            1,
            {"projector_moe__num_moe_experts": 4, "optimizer__optimizer": "muon"},
            "optimizer.optimizer=muon with projector_moe has not been tried",
        ),
        (
            1,
            {
                "tower_moe__num_moe_experts": 4,
                "data__modalities": [{"name": "depth", "levels": "uint16", "projector": "own"}],
            },
            "tower_moe with depth in data.modalities: experts of tower and projector beside towers or projectors of a",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(world, fields, message):
    assert message in problems(world, **fields)


def test_they_make_expert_parallelism_of_a_dense_language_model():
    assert "needs a MoE model" in problems(2, moe=None, **{LAYOUT: 2})
    assert "needs a MoE model" not in problems(2, moe=None, **{LAYOUT: 2, "projector_moe__num_moe_experts": 4})


def test_the_recipe_has_the_papers_numbers():
    run = load_config(str(REPO / "examples/recipes/cumo.yaml"), ["model.backbone=llama-tiny", "training.stage=2"])
    assert (run.tower_moe, run.projector_moe) == (TowerMoEConfig(), ProjectorMoEConfig())
    assert {"tower", "projector"} <= {*run.training.trains}
    numbers = {moe.num_moe_experts: moe.moe_router_topk for moe in run.mixtures.values()}
    assert (numbers, run.projector_moe.moe_aux_loss_coeff, run.projector_moe.moe_z_loss_coeff) == ({4: 2}, 0.1, 0.01)
