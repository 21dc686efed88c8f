"""Routing metrics: who is counted where, exactly; what is a warning; what reaches the files."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.routing.health import RoutingHealthMonitor, troubles
from megatron_moellava.routing.observer import RoutingObserver
from megatron_moellava.routing.records import routing_record
from megatron_moellava.routing.token_groups import question_types, token_groups, turn_numbers
from megatron_moellava.training.metrics import StepLog, routing_scalars
from tests.helpers.batches import X, padded, words
from tests.helpers.inference_models import scatter, tiny_run

# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_turn_ends_with_its_answer_and_the_rest_belongs_to_the_last():
    assert turn_numbers(torch.tensor([X, 7, 8, X, 9, X])).tolist() == [0, 0, 0, 1, 1, 1]
    assert turn_numbers(torch.tensor([X, X])).tolist() == [0, 0]


def test_tokens_of_each_turn_get_its_type():
    batch = padded([[4, 5, 6, 7, 8, 9]], [[X, 7, X, X, 9, X]], ["color+shape"])
    names, types_BS = question_types(batch)
    assert [names[i] for i in types_BS[0].tolist()] == ["color"] * 2 + ["shape"] * 4


def test_a_tag_that_does_not_name_the_turns_is_one_type():
    names, types_BS = question_types(padded([[4, 5, 6, 7]], [[X, 7, X, X]], ["a+b"]))
    assert names == ["a+b"]
    assert types_BS.tolist() == [[0] * 4]


def test_packed_samples_have_their_own_tags_and_the_tail_has_none():
    ends = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    batch = padded([[4, 5, 6, 7, 0, 0]], [[5, X, 7, X, X, X]], ["color", ""], cu_seqlens=ends)
    names, types_BS = question_types(batch)
    assert (names, types_BS.tolist()) == (["color"], [[0, 0, -1, -1, -1, -1]])


def test_padding_and_images_are_not_text():
    names, members_GBS = token_groups(padded([[IMAGE_TOKEN, 5, 6, 0]], [[X, 6, X, X]], ["color"]))
    assert names == ["text", "image", "type:color"]
    assert members_GBS[:, 0].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]]


# --- counting ---------------------------------------------------------------------------------------------------------


def observed(moe: MoEConfig, batch: Batch, training: bool = True):
    """(sums, [(probs [N, E], map [N, E]) of every router]) of one forward pass."""
    parallel.initialize(ParallelConfig(), 1)
    (model,) = build_model(tiny_run(moe))
    scatter(model)
    model.train(training)
    observer, outputs = RoutingObserver([model]), []
    for router in observer.routers:
        router.register_forward_hook(lambda router, inputs, output: outputs.append(output))
    with observer.observe(batch):
        model(**model_inputs(batch))
    model(**model_inputs(batch))  # outside of the context: not counted
    return observer.collect(), outputs


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
    MoEConfig(router="original", capacity_factor=0.5, second_choice="deterministic"),
    MoEConfig(capacity_factor=0.5),
    MoEConfig(capacity_factor=0.5, moe_router_enable_expert_bias=True),
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


def test_record_of_balanced_routing_says_so():
    sums, _ = observed(MoEConfig(), words())
    even = torch.zeros_like(sums.sums_GLC)
    even[..., :8], even[..., 8:12], even[..., 12:] = 50.0, 25.0, torch.tensor([100.0, 138.62944, 25.0, 25.0])
    layer = routing_record(replace(sums, sums_GLC=even), {"z_loss": [0.5, 0, 0.25, 0]})["layers"][0]
    assert layer["balance"] == pytest.approx(1.0)
    assert layer["entropy"] == pytest.approx(1.0)
    assert (layer["max_load"], layer["z_loss"]) == (1.0, 0.5)


# --- warnings ---------------------------------------------------------------------------------------------------------


def record(choices: list[int], topk: int = 2, dropped: list[int] | None = None) -> dict:
    tokens = sum(choices) // topk
    return {"topk": topk, "layers": [{"layer": 3, "choices": choices, "tokens": tokens, "dropped": dropped or [0] * 4}]}


@pytest.mark.parametrize("choices, topk, expected", [
    ([500, 500, 500, 500], 2, set()),
    ([700, 500, 500, 300], 2, set()),
    ([980, 400, 310, 310], 2, {("collapse", 0)}),
    ([970, 10, 10, 10], 1, {("collapse", 0)}),
    ([900, 600, 499, 1], 2, {("dead", 3)}),
    ([40, 30, 30, 0], 2, set()),  # too few to tell
    ([500, 500, 500, 500], 4, set()),  # every expert takes every token
])  # fmt: skip
def test_collapse_and_dead_experts_are_found(choices, topk, expected):
    assert {(trouble.kind, trouble.expert) for trouble in troubles(record(choices, topk))} == expected


def test_an_expert_that_drops_all_it_is_asked_for_is_not_dead():
    assert not troubles(record([500, 500, 500, 0], dropped=[0, 0, 0, 500]))


def test_a_warning_comes_once_and_again_when_it_comes_back():
    health_monitor = RoutingHealthMonitor()
    bad, good = record([970, 10, 10, 10], 1), record([250, 250, 250, 250], 1)
    (text,) = health_monitor(bad)
    assert "layer 3: expert 0 takes 97% of the tokens" in text
    assert "moe.moe_aux_loss_coeff" in text
    assert health_monitor(bad) == []
    assert health_monitor(good) == []
    assert len(health_monitor(bad)) == 1


def test_log_writes_record_and_warning(tmp_path, capsys):
    parallel.initialize(ParallelConfig(), 1)
    sums, _ = observed(MoEConfig(), words())
    observation = routing_record(sums, {"load_balancing_loss": [1.5, 0.0, 1.25, 0.0]})
    log = StepLog(tmp_path, True, "stage 3", 10)
    log.routing(
        5, observation | {"topk": 1, "layers": [observation["layers"][0] | record([970, 10, 10, 10])["layers"][0]]}
    )
    log.routing(10, observation)
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "routing.jsonl").open())
    assert "stage 3 step 5 warning: layer 3: expert 0" in capsys.readouterr().out
    assert (first["iteration"], len(first["warnings"]), second["warnings"]) == (5, 1, [])
    assert second["layers"][1]["load_balancing_loss"] == 1.25
    assert list(tmp_path.glob("tensorboard/events*"))
    scalars = routing_scalars(observation)
    assert sum(scalars[f"routing/layer0/text/expert{e}"] for e in range(4)) == pytest.approx(1.0)
    assert "routing/layer2/type:color/entropy" in scalars
