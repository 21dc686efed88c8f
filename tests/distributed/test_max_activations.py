"""The largest activation and gradient of each layer are the same numbers under every layout."""

import json

import pytest

LAYOUTS = ("dp2", "tp2", "pp2", "ep2", "cp2", "pp2-vpp2", "tp2-ep2-etp1")
TOLERANCE = 1e-4  # of a record with six digits


def job(name: str) -> dict:
    return {
        "id": f"max activations {name}",
        "run": "run_max_activations",
        "layout": f"llama:{name}",
        "world": 1 if name == "one" else 2,
    }


@pytest.mark.parametrize("job", [job("one")], ids=["one"])
def test_one_process_sees_every_layer(job, result):
    for row in result["layers"]:
        assert row["hidden"] > 0 and row["hidden_gradient"] > 0 and row["mlp_gradient"] > 0
        assert ("router_logits" in row) == (row["layer"] % 2 == 0)


@pytest.mark.parametrize("job", [job(name) | {"needs": [job("one")]} for name in LAYOUTS], ids=LAYOUTS)
def test_layouts_see_what_one_process_sees(job, result, results):
    expected = json.loads((results / "max activations one.json").read_text())["layers"]
    for row, reference in zip(result["layers"], expected, strict=True):
        assert row == pytest.approx(reference, rel=TOLERANCE), row["layer"]
