"""What is a warning, and what of it reaches the files of a run."""

import json

import pytest

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.routing.health import RoutingHealthMonitor, find_anomalies
from megatron_moellava.routing.records import routing_record
from megatron_moellava.routing.statistics import RoutingStatistics
from megatron_moellava.training.metrics import StepLog, routing_scalars
from tests.helpers.batches import words
from tests.helpers.inference_models import tiny_run


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
    assert {(anomaly.kind, anomaly.expert) for anomaly in find_anomalies(record(choices, topk))} == expected


def test_experts_by_modality_are_judged_by_their_fair_load():
    """Few text tokens are no dead expert, and the one image expert that must take nearly all tokens is no collapse."""
    found = record([1900, 1950, 75, 75])
    assert {(anomaly.kind, anomaly.expert) for anomaly in find_anomalies(found)} == {("collapse", 0), ("collapse", 1)}
    found["layers"][0]["fair"] = [1925.0, 1925.0, 75.0, 75.0]
    assert not find_anomalies(found)
    found["layers"][0] |= {"choices": [1800, 1650, 1, 549], "fair": [1725.0, 1725.0, 275.0, 275.0]}
    assert [(anomaly.kind, anomaly.expert) for anomaly in find_anomalies(found)] == [("dead", 2)]


def test_an_expert_that_drops_all_it_is_asked_for_is_not_dead():
    assert not find_anomalies(record([500, 500, 500, 0], dropped=[0, 0, 0, 500]))


def test_a_warning_comes_once_and_again_when_it_comes_back():
    monitor = RoutingHealthMonitor()
    bad, good = record([970, 10, 10, 10], 1), record([250, 250, 250, 250], 1)
    (text,) = monitor(bad)
    assert "layer 3: expert 0 takes 97% of the tokens" in text
    assert "moe.moe_aux_loss_coeff" in text
    assert monitor(bad) == []
    assert monitor(good) == []
    assert len(monitor(bad)) == 1


def test_log_writes_record_and_warning(tmp_path, capsys):
    parallel.initialize(ParallelConfig(), 1)
    (model,) = build_model(tiny_run(MoEConfig()))
    statistics = RoutingStatistics([model])
    with statistics.count(words()):
        model(**model_inputs(words()))
    observation = routing_record(statistics.collect(), {"load_balancing_loss": [1.5, 0.0, 1.25, 0.0]})
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


def test_each_part_of_the_model_has_a_log_and_advice_of_its_own(tmp_path, capsys):
    log = StepLog(tmp_path, False, "stage 2", 10)
    (layer,) = record([970, 10, 10, 10], 1)["layers"]
    layer |= {"groups": {}, "entropy": 0.5, "top1": 0.9, "top2": 0.1}
    for component in ("language", "tower"):
        log.routing(5, {"topk": 1, "layers": [layer]}, component)
    log.close()
    language, tower = capsys.readouterr().out.splitlines()
    assert "tower" not in language and "moe.moe_aux_loss_coeff" in language
    assert "warning: tower, layer 3: expert 0" in tower and "raise tower_moe.moe_aux_loss_coeff" in tower
    names = [path.name for path in sorted(tmp_path.glob("routing*.jsonl"))]
    assert names == ["routing.jsonl", "routing_tower.jsonl"]
    for name in names:
        (line,) = (tmp_path / name).read_text().splitlines()
        assert json.loads(line)["iteration"] == 5
