"""The report of an analysis: pictures, numbers, one HTML file."""

import json
import re

import pytest

from megatron_moellava.analysis.command import write_report
from tests.helpers.made_routes import routes, similarity


@pytest.mark.parametrize("shape", [(3, 4, 2), (9, 11, 3), (1, 2, 1)], ids=str)
def test_report_is_one_file_for_any_number_of_layers_experts_and_choices(tmp_path, shape):
    layers, experts, topk = shape
    text = write_report(
        tmp_path, "runs/<stage3>", ["a.json"], routes(layers, experts, topk), similarity(layers, experts), pca=True
    )
    html = (tmp_path / "report.html").read_text()
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    expected = [
        "confidence",
        "load",
        "modality",
        "overlay_00",
        "pathways",
        "pathways_pca",
        "siblings",
        "similarity",
        "types",
    ]
    assert pictures == sorted(f"{name}.png" for name in expected + (["coactivation"] if topk > 1 else []))
    assert html.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", html), "something would be fetched"
    assert "runs/&lt;stage3&gt;" in html and "<stage3>" not in html
    assert "report.html" in text
    numbers = json.loads((tmp_path / "routing.json").read_text())
    assert len(numbers["layers"]) == layers and not numbers["warnings"]


def test_report_warns_of_a_dead_expert(tmp_path):
    made = routes(tokens=3000)
    layer = made.record["layers"][1]
    layer["choices"] = [3000, 2000, 999, 1]
    text = write_report(tmp_path, "x", ["a.json"], made, similarity())
    assert "warning: layer 2: expert 3 is dead" in text
    assert 'class="warning"' in (tmp_path / "report.html").read_text()
    assert 'class="good"' not in (tmp_path / "report.html").read_text()
