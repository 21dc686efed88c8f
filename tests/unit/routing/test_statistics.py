"""Routing statistics: who is counted where, exactly."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import ExpertGroups, MoEConfig, ParallelConfig, ProjectorMoEConfig, TowerMoEConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.routing.records import RoutingSums, routing_record
from megatron_moellava.routing.statistics import RoutingStatistics
from tests.helpers.batches import words
from tests.helpers.inference_models import scatter, tiny_run
from tests.helpers.modalities import DEPTH, THERMAL


def observed(moe: MoEConfig, batch: Batch, training: bool = True):
    """(sums, [(probs [N, E], map [N, E]) of every router]) of one forward pass."""
    parallel.initialize(ParallelConfig(), 1)
    (model,) = build_model(tiny_run(moe))
    scatter(model)
    model.train(training)
    statistics, outputs = RoutingStatistics([model]), []
    for router in statistics.observer.routers.values():
        router.register_forward_hook(lambda router, inputs, output: outputs.append(output))
    with statistics.count(batch):
        model(**model_inputs(batch))
    model(**model_inputs(batch))  # outside of the context: not counted
    return statistics.collect(), outputs


def test_every_real_token_is_counted_once_for_each_choice():
    batch = words()
    sums, outputs = observed(MoEConfig(), batch)
    assert (sums.groups, sums.layers) == (("text", "image", "type:color", "type:shape"), (0, 2))
    real_N = batch.padding_mask_BS.T.flatten()
    for index, layer in enumerate(sums.layers):
        expected = outputs[index][1][real_N].sum(dim=0)
        assert torch.equal(sums.choices_LME[layer, 0], expected.long())
    assert not sums.choices_LME[:, 1].any()
    by_type = sums.column("tokens")[2:, 0]
    assert by_type.tolist() == [12, 9]
    assert torch.equal(sums.column("asked"), sums.column("choices"))


def test_confidence_and_entropy_are_those_of_the_router():
    batch = words()
    sums, outputs = observed(
        MoEConfig(moe_router_topk=1), batch
    )  # with one choice its weight is the probability itself
    real_N = batch.padding_mask_BS.T.flatten()
    record = routing_record(sums)
    for index, layer in enumerate(record["layers"]):
        best_N = outputs[index][0].max(dim=-1).values[real_N]
        assert layer["top1"] == pytest.approx(float(best_N.mean()), rel=1e-6)
        assert 0 < layer["entropy"] < 1
        assert layer["top2"] < layer["top1"]


@pytest.mark.parametrize("moe", [
    MoEConfig(router="original", moe_expert_capacity_factor=0.5, second_choice="deterministic"),
    MoEConfig(moe_expert_capacity_factor=0.5),
    MoEConfig(moe_expert_capacity_factor=0.5, moe_router_enable_expert_bias=True),
], ids=["original", "megatron", "megatron with bias"])  # fmt: skip
def test_dropped_choices_are_those_asked_for_and_not_given(moe):
    batch = words(rows=1, length=32)
    sums, _ = observed(moe, batch)
    asked, given = sums.column("asked")[0], sums.column("choices")[0]
    for layer in sums.layers:
        assert asked[layer].sum() == 2 * sums.column("tokens")[0, layer]
        assert (given[layer] <= asked[layer]).all()
        assert given[layer].sum() < asked[layer].sum()
    dropped = routing_record(sums)["layers"][0]["dropped"]
    assert sum(dropped) == int((asked - given)[0].sum())


def of_pictures(moe: MoEConfig) -> RoutingSums:
    """Of 21 tokens, 3 of which are of depth and 3 of a plain picture."""
    batch = words(rows=2, length=12)
    batch.tokens_BS[0, 1:6] = batch.tokens_BS[1, 2] = IMAGE_TOKEN
    batch.pictures = (("depth", 2), ("image", 3), ("depth", 1))
    batch.counts, batch.pixel_values_NCHW = None, torch.zeros(0, 3, 28, 28)
    parallel.initialize(ParallelConfig(), 1)
    run = tiny_run(moe)
    (model,) = build_model(replace(run, data=replace(run.data, modalities=(DEPTH, THERMAL))))
    scatter(model)
    statistics = RoutingStatistics([model])
    with statistics.count(batch):
        embeddings_SBD = torch.randn(12, 2, model.config.hidden_size)
        model(
            batch.tokens_BS, batch.position_ids_BS, padding_mask_BS=batch.padding_mask_BS, embeddings_SBD=embeddings_SBD
        )
    return statistics.collect()


def test_visual_tokens_are_counted_by_modality():
    sums = of_pictures(MoEConfig())
    assert sums.groups[:4] == sums.modalities == ("text", "image", "depth", "thermal")
    assert sums.column("tokens")[:4, 0].tolist() == [21 - 6, 3, 3, 0]
    (layer, *_) = routing_record(sums)["layers"]
    assert layer["tokens"] == 21 and layer["groups"].keys() == {"text", "image", "depth", "type:color", "type:shape"}


def test_pictures_of_every_kind_have_the_experts_of_images():
    sums = of_pictures(MoEConfig(expert_groups=ExpertGroups(image=2, text=1, shared=1)))
    assert sums.admissible == ((2, 3), (0, 1, 2), (0, 1, 2), (0, 1, 2))
    assert [sums.experts(group) for group in ("text", "image", "depth", "type:color")] == [2, 3, 3, 2]
    (layer, *_) = routing_record(sums)["layers"]
    assert layer["groups"]["text"]["choices"][:2] == [0, 0] and layer["groups"]["depth"]["choices"][3] == 0
    assert layer["fair"] == pytest.approx([4.0, 4.0, 4.0 + 15, 15.0])  # 6 visual tokens and 15 others, two choices each


def test_experts_of_tower_and_projector_count_images_alone():
    """Every row of the tower and every visual token, for each choice; a stand-in for images is none."""
    parallel.initialize(ParallelConfig(), 1)
    vision = {"tower_moe": TowerMoEConfig(placement=(1,)), "projector_moe": ProjectorMoEConfig(num_moe_experts=3)}
    (model,) = build_model(replace(tiny_run(None), **vision))
    statistics = {component: RoutingStatistics([model], component) for component in model.run.mixtures}
    with statistics["tower"].count(words()), statistics["projector"].count(words()):
        model.encode_images(torch.randn(2, 3, 72, 72))
        model.embed(words().tokens_BS, None)  # with a graph: a stand-in goes through both
    sums = {component: counting.collect() for component, counting in statistics.items()}
    rows = {"tower": 2 * model.tower.num_rows, "projector": 2 * model.tower.num_features}
    for component, layer, experts in (("tower", 1, 4), ("projector", 0, 3)):
        record = routing_record(sums[component], {"z_loss": [1.0, 2.0]})
        assert (record["num_experts"], [item["layer"] for item in record["layers"]]) == (experts, [layer])
        (found,) = record["layers"]
        assert found["tokens"] == rows[component] and sum(found["choices"]) == 2 * rows[component]
        assert found["groups"].keys() == {"image"} and 1.0 <= found["max_load"] <= experts
