"""What pipeline ranks compute, gathered over their layers."""

from dataclasses import replace

import pytest

from megatron_moellava.config import Modality
from megatron_moellava.costs.stage_work import Load, decoder_work, model_flops, recomputed_work, stage_work
from tests.helpers.planning import layout_of

LOAD = Load(tokens=4096, length=512, images=4, samples=8)


def forward(works) -> float:
    return sum(work.forward for work in works)


def test_stages_together_do_what_one_does():
    one = layout_of(1)
    for layout in (
        layout_of(4, parallel__pipeline_model_parallel_size=4),
        layout_of(4, parallel__pipeline_model_parallel_size=2, parallel__tensor_model_parallel_size=2),
    ):
        assert model_flops(layout, LOAD) == pytest.approx(
            model_flops(one, LOAD), rel=1e-12
        )  # the patches' too, which every rank has


def test_only_the_first_stage_sees_images_and_only_the_last_the_vocabulary():
    layout = layout_of(4, parallel__pipeline_model_parallel_size=4)
    parts = [{work.part for work in stage_work(layout, rank, 4096, 512, 4)} for rank in range(4)]
    assert ["tower" in found for found in parts] == [True, False, False, False]
    assert ["output" in found for found in parts] == [False, False, False, True]


@pytest.mark.parametrize("recompute", ["none", "selective", "moe_act", "moe", "full"])
def test_more_recomputation_does_more_again(recompute):
    layout = layout_of(1, training__recompute=recompute)
    again = forward(recomputed_work(layout, 0, 4096, 512, 4))
    whole = forward(decoder_work(layout, 0, 4096, 512))
    parts = {work.part for work in recomputed_work(layout, 0, 4096, 512, 4)}
    assert {
        "none": again == 0,
        "moe_act": again == 0,  # no product
        "selective": parts == {"core attention"},
        "moe": parts == {"core attention", "router", "experts"} and again < whole,
        "full": again == pytest.approx(whole),
    }[recompute]


def test_recomputed_work_is_no_useful_work():
    assert model_flops(layout_of(1, training__recompute="full"), LOAD) == model_flops(layout_of(1), LOAD)


@pytest.mark.parametrize("trains", [("projector",), ("tower", "projector", "language.ffn")])
def test_pictures_through_a_copy_of_the_tower_cost_what_they_cost_through_the_tower(trains):
    shared = layout_of(1, training__trains=trains)
    name = shared.tower.name
    record = Modality(name="depth", levels="uint16", tower=name, projector="own")
    apart = layout_of(1, training__trains=trains, data__modalities=(record,))
    both = replace(LOAD, images=4, apart=(2,))
    assert model_flops(apart, both) == pytest.approx(model_flops(shared, replace(LOAD, images=6)), rel=1e-12)
    assert model_flops(apart, LOAD) == model_flops(apart, replace(LOAD, apart=(4,))), "a plan has as many of each"
