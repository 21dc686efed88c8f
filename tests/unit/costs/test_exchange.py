"""Rows of tower and projector on their way to experts of other ranks; counted bytes: `benchmarks/communication.py`."""

from dataclasses import replace

from megatron_moellava.config import ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.costs.exchange import vision_exchanges
from megatron_moellava.costs.layout import Layout
from tests.helpers.planning import layout_of


def with_experts(**settings) -> Layout:
    """phi-2 whose tower has experts in every other layer, and whose projector has some."""
    layout = layout_of(**settings)
    mixtures = {"tower_moe": TowerMoEConfig(placement="sparse"), "projector_moe": ProjectorMoEConfig(moe_router_topk=1)}
    return replace(layout, run=replace(layout.run, **mixtures))


def test_a_dense_tower_and_projector_send_nothing():
    assert not list(vision_exchanges(layout_of(), 4))


def test_rows_go_to_their_experts_with_their_weights_and_come_back():
    layout = with_experts()
    of_tower, of_projector = vision_exchanges(layout, 4)
    tower, copies = layout.tower, layout.run.tower_moe.moe_router_topk
    layers = len(layout.model.tower_moe_layers)
    assert 0 < layers < tower.num_used_layers
    rows = 4 * tower.num_rows * copies
    assert of_tower.forward(2) == layers * rows * (2 * 2 * tower.hidden_size + 4)
    assert of_projector.forward(2) == 4 * tower.num_features * (
        2 * (tower.hidden_size + layout.backbone.hidden_size) + 4
    )


def test_gradients_go_back_only_where_they_are_wanted():
    """Stage 3 leaves the tower as it is: no gradient of features, but those of what the projector's experts say."""
    of_tower, of_projector = vision_exchanges(with_experts(), 4)
    assert of_tower.backward(2) == 0
    assert of_projector.backward(2) == of_projector.rows * (2 * of_projector.outputs + 4)
    trained, projector = vision_exchanges(with_experts(training__trains=("tower", "router")), 4)
    assert trained.backward(2) == trained.forward(2) and projector.backward(2) == projector.forward(2)


def test_tensor_parallel_ranks_divide_the_rows():
    whole, split = (with_experts(parallel__tensor_model_parallel_size=size) for size in (1, 2))
    for one, half in zip(vision_exchanges(whole, 4), vision_exchanges(split, 4), strict=True):
        assert half.rows == one.rows / 2
