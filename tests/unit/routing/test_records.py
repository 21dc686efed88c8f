"""Sums over tokens as the numbers of logs and reports."""

import json
import math
from dataclasses import replace

import pytest
import torch

from megatron_moellava.routing.records import PER_EXPERT, PER_TOKEN, RoutingSums, routing_record

EXPERTS = 3


def sums() -> RoutingSums:
    """Two decoder layers, the second with experts; ten text tokens, top-1, two of them dropped."""
    columns = {
        "choices": [4.0, 4.0, 0.0],
        "asked": [6.0, 4.0, 0.0],
        "probability": [5.0, 3.0, 2.0],
        "tokens": [10.0],
        "entropy": [10 * math.log(3) / 2],
        "top1": [7.0],
        "top2": [2.0],
    }
    row = torch.tensor([value for name in (*PER_EXPERT, *PER_TOKEN) for value in columns[name]], dtype=torch.float64)
    sums_GLC = torch.zeros(3, 2, len(row), dtype=torch.float64)
    sums_GLC[0, 1] = sums_GLC[2, 1] = row
    return RoutingSums(("text", "image", "type:color"), (1,), EXPERTS, 1, sums_GLC)


def test_columns_are_found_by_name():
    found = sums()
    assert found.column("asked")[0, 1].tolist() == [6.0, 4.0, 0.0] and float(found.column("top1")[0, 1]) == 7.0
    assert found.choices_LME.tolist() == [[[0] * 3] * 2, [[4, 4, 0], [0, 0, 0]]]


def test_a_record_has_layers_with_experts_and_groups_with_tokens():
    record = routing_record(sums(), {"z_loss": [0.0, 0.5]})
    (layer,) = record["layers"]
    assert (record["num_experts"], record["topk"], layer["layer"], layer["z_loss"]) == (3, 1, 1, 0.5)
    assert layer["groups"].keys() == {"text", "type:color"}, "there was no image token"
    assert (layer["tokens"], layer["choices"], layer["dropped"]) == (10, [4, 4, 0], [2, 0, 0])
    assert (layer["entropy"], layer["top1"], layer["top2"]) == pytest.approx((0.5, 0.7, 0.2))
    assert layer["max_load"] == pytest.approx(0.6 * 3)
    assert layer["balance"] == pytest.approx(3 * (0.6 * 0.5 + 0.4 * 0.3))
    assert json.loads(json.dumps(record)) == record


def test_a_further_modality_is_a_part_of_all_tokens():
    found = sums()
    split = replace(found, groups=("text", "image", "depth"), modalities=("text", "image", "depth"))
    (layer,) = routing_record(split)["layers"]
    assert (layer["tokens"], layer["choices"]) == (20, [8, 8, 0])
    assert set(layer["groups"]) == {"text", "depth"} and split.choices_LME.shape == (2, 3, EXPERTS)
    (layer,) = routing_record(found)["layers"]
    assert layer["tokens"] == 10, "a question type is not"


def by_modality(text: list[float], image: list[float]) -> dict:
    """The layer's record of choices of expert 0 (images'), 1 (shared) and 2 (text's), top-1, with even probabilities."""

    def row(choices: list[float], experts: list[int]) -> list[float]:
        tokens = sum(choices)
        probability = [tokens / len(experts) if e in experts else 0.0 for e in range(3)]
        return [*choices, *choices, *probability, tokens, tokens * math.log(len(experts)), tokens / 2, tokens / 2]

    sums_GLC = torch.tensor([[row(text, [1, 2])], [row(image, [0, 1])]], dtype=torch.float64)
    found = RoutingSums(("text", "image"), (0,), EXPERTS, 1, sums_GLC, admissible=((1, 2), (0, 1)))
    return routing_record(found)["layers"][0]


def test_experts_by_modality_are_judged_by_what_their_modality_could_give_them():
    even = by_modality(text=[0.0, 100.0, 100.0], image=[500.0, 500.0, 0.0])
    assert even["fair"] == [500.0, 600.0, 100.0]
    assert (even["max_load"], even["balance"], even["entropy"]) == pytest.approx((1.0, 1.0, 1.0))
    assert even["groups"]["text"]["balance"] == even["groups"]["image"]["max_load"] == pytest.approx(1.0)
    skewed = by_modality(text=[0.0, 0.0, 200.0], image=[500.0, 500.0, 0.0])
    assert skewed["max_load"] == pytest.approx(2.0), "twice what is fair, though another has more"
