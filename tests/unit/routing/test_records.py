"""What the sums over tokens mean, as numbers for logs and reports."""

import pytest
import torch

from megatron_moellava.routing.records import PER_EXPERT, PER_TOKEN, RoutingSums, routing_record


def sums(choices: list[float], asked: list[float], probability: list[float], tokens: list[float]) -> RoutingSums:
    """Text tokens of one layer out of two; the other modality and the dense layer have none."""
    row_C = torch.tensor([*choices, *asked, *probability, *tokens], dtype=torch.float64)
    assert len(row_C) == len(PER_EXPERT) * 4 + len(PER_TOKEN)
    sums_GLC = torch.zeros(2, 2, len(row_C), dtype=torch.float64)
    sums_GLC[0, 1] = row_C
    return RoutingSums(groups=("text", "image"), layers=(1,), num_experts=4, topk=2, sums_GLC=sums_GLC)


def test_record_of_balanced_routing_says_so():
    even = sums([50.0] * 4, [50.0] * 4, [25.0] * 4, [100.0, 138.62944, 25.0, 25.0])
    (layer,) = routing_record(even, {"z_loss": [0.0, 0.25]})["layers"]
    assert layer["balance"] == pytest.approx(1.0)
    assert layer["entropy"] == pytest.approx(1.0)
    assert (layer["layer"], layer["max_load"], layer["z_loss"]) == (1, 1.0, 0.25)
    assert list(layer["groups"]) == ["text"], "a group without tokens has no numbers"


def test_record_counts_what_was_asked_for_and_dropped():
    (layer,) = routing_record(sums([60, 60, 20, 0], [120, 60, 20, 0], [70, 20, 10, 0], [100, 69.3, 70, 20]))["layers"]
    assert (layer["choices"], layer["dropped"]) == ([60, 60, 20, 0], [60, 0, 0, 0])
    assert layer["max_load"] == pytest.approx(120 / 50)
    assert layer["balance"] == pytest.approx(4 * (0.6 * 0.7 + 0.3 * 0.2 + 0.1 * 0.1))
    assert (layer["top1"], layer["top2"]) == (0.7, 0.2)
