"""Pathways, co-activation and the report, from imagined tokens."""

import json
import re

import numpy as np
import pytest
import torch

from megatron_moellava.analysis.command import write_report
from megatron_moellava.analysis.figures import spread, token_grid
from megatron_moellava.analysis.pathways import coactivation, frequent_pathways, principal_pathways
from megatron_moellava.analysis.routing import as_conversation, first_choices
from tests.helpers.made_routes import routes, similarity


def test_frequent_pathways_are_the_ones_that_occur():
    first_TL = np.array([[0, 1], [2, 1], [0, 1], [0, 1], [3, -1]])
    found = frequent_pathways(first_TL, most=1)
    assert found.experts_PL.tolist() == [[0, 1]]
    assert found.counts_P.tolist() == [3]
    assert (found.tokens, found.distinct) == (4, 2)  # the token with a dropped choice has no pathway
    assert found.shares() == pytest.approx([0.75])
    assert frequent_pathways(np.full((3, 2), -1)).tokens == 0


def test_principal_pathways_are_the_originals():
    """Scores of scikit-learn's PCA over layers, scaled, clipped and quantised (specification of the original's figure 6)."""
    from sklearn.decomposition import PCA

    first_TL = np.random.default_rng(0).integers(0, 4, (50, 14))
    scores_LP = PCA(n_components=12, svd_solver="full").fit_transform(first_TL.T)
    scaled = (scores_LP - scores_LP.min(0)) / (scores_LP.max(0) - scores_LP.min(0))
    expected = (scaled.clip(0.01, 0.99) * 4).astype(int).T
    assert np.array_equal(principal_pathways(first_TL, 4), expected)
    assert principal_pathways(first_TL[:, :3], 4).shape == (3, 3)  # the original fails with fewer than 12 layers


def test_coactivation_counts_pairs_of_one_token():
    choices_TLK = np.array([[[0, 1]], [[1, 2]], [[1, -1]]], dtype=np.int16)
    expected = np.array([[1, 1, 0], [1, 3, 1], [0, 1, 1]]) / 3
    assert coactivation(choices_TLK, 3)[0] == pytest.approx(expected)


def test_dropped_choices_are_no_experts():
    weights_TE = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert first_choices(weights_TE, 2).tolist() == [[2, 0], [1, -1]]


def test_closed_questions_become_conversations():
    row = {"question_id": 3, "image": "a.png", "question": "which?", "answer": "red", "type": "color"}
    record = as_conversation(row)
    assert record["conversations"][0]["value"] == "<image>\nwhich?"
    assert (record["tag"], record["image"]) == ("color", "a.png")
    assert "image" not in as_conversation({"question": "is it?", "answer": "yes"})


def test_visual_tokens_become_a_square():
    assert token_grid(np.arange(9)).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert token_grid(np.arange(8))[0].tolist() == [-1, 0, 1]  # SigLIP without its first patch
    assert spread(5, 3) == [0, 2, 4]


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
