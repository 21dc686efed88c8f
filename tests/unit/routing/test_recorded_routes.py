"""What the benchmark of recorded routes takes from a run."""

import json
from types import SimpleNamespace

from benchmarks import recorded_routes
from megatron_moellava.conversion.routing_log import PLACED_AT


def record(iteration: int, choices: list[int]) -> dict:
    row = {"layer": 1, "choices": choices, "dropped": [0] * len(choices)}
    return {"iteration": iteration, "topk": 1, "layers": [row]}


def test_loads_from_before_the_experts_last_move_are_not_taken(tmp_path, monkeypatch):
    records = [record(10, [9, 1]), record(20, [8, 2]), record(30, [3, 7]), record(40, [4, 6])]
    (tmp_path / "routing.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))
    monkeypatch.setattr(recorded_routes, "ROUTES", tmp_path / "routes.json")
    recorded_routes.take(tmp_path, "all")  # without a checkpoint nothing is known to have moved
    monkeypatch.setattr(recorded_routes, "newest_checkpoint", lambda run: run)
    placed = SimpleNamespace(provenance={PLACED_AT: 20})
    monkeypatch.setattr(recorded_routes, "read_description", lambda checkpoint: placed)
    recorded_routes.take(tmp_path, "placed")
    routes = json.loads((tmp_path / "routes.json").read_text())
    assert routes["all"]["layers"] == {"1": [24, 16]} and routes["placed"]["layers"] == {"1": [7, 13]}
