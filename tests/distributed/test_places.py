"""Experts that change their places while a run goes on: the same numbers as where they stay."""

import pytest

TOLERANCE = 1e-5  # as in test_layouts.py: two runs that differ in the order of sums only
BEFORE, AFTER = 2, 2  # steps, as in places.py

LAYOUTS = ("expert-bias:ep2", "average:ep2-overlap", "muon:ep2")
jobs = [
    {"id": f"places {layout}", "run": "run_places", "layout": layout, "world": 2, "share": 0.001} for layout in LAYOUTS
]
whole = {"id": "placed run", "run": "run_placed_run", "world": 2}


@pytest.mark.parametrize("job", jobs, ids=LAYOUTS)
def test_results_do_not_change(job, result):
    assert any(sorted(order) != order for order in result["orders"].values()) and result["placed_at"] == BEFORE
    assert result["records"] == list(range(1, BEFORE + AFTER + 1))
    assert result["moved"] > 0.1, "weights are elsewhere"
    for when, error in (("saved", 0.0), ("final", TOLERANCE)):
        for name, (difference, where) in result[when].items():
            assert difference <= error, f"{name} {when}: {difference:.1e} at {where}"
    for name, (difference, _) in result["numbers"].items():
        assert difference <= TOLERANCE, (name, difference)
    assert result["copies"] == 0.0, "copies of one shard differ between ranks"


@pytest.mark.parametrize("job", jobs, ids=LAYOUTS)
def test_the_placed_checkpoint_continues_exactly(job, result):
    assert result["resumed_losses"][0] == result["resumed_losses"][1]
    assert {name: difference for name, (difference, _) in result["resumed"].items()} == dict.fromkeys(
        result["resumed"], 0.0
    )


@pytest.mark.parametrize("job", [whole], ids=["placed run"])
def test_a_run_places_its_experts_at_every_checkpoint_but_the_last(job, result):
    assert result["exit"] == 0
    assert result["placed_at"] == {"iter_0000002": 2, "iter_0000004": 2}
