"""Which experts the tokens of a request went to."""

from dataclasses import replace

import torch

from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.inference.prompts import Prompt
from megatron_moellava.inference.routing_record import RoutingRecord
from megatron_moellava.inference.text import TextStream


class Letters:
    def decode(self, ids):
        return bytes(ids).decode()


def prompt(*tokens: int, tiles: tuple[int, ...] = ()) -> Prompt:
    return Prompt(tokens=list(tokens), pixels_NCHW=torch.zeros(sum(tiles), 1), tiles=tiles)


def test_a_dense_model_has_no_table():
    assert RoutingRecord().table(prompt(97), TextStream(Letters())) is None


def test_tokens_have_their_experts_best_first_and_their_names():
    """Prompt "a", an image of two tokens; then the answer "b", whose step held another request's token as well."""
    record = RoutingRecord()
    record.add({2: torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0], [0.2, 0.8, 0.0]])}, slice(0, 3))
    record.add({2: torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.4, 0.6]])}, slice(1, 2))
    stream = TextStream(Letters(), tokens=[98, 99])  # "c" has been said and not read yet
    table = record.table(prompt(97, IMAGE_TOKEN, IMAGE_TOKEN, tiles=(1,)), stream)
    assert table["num_experts"] == 3
    assert table["tokens"] == [
        {"text": "a"},
        {"image": 0, "patch": 0},
        {"image": 0, "patch": 1},
        {"text": "b", "answer": True},
    ]
    (layer,) = table["layers"]
    assert layer["layer"] == 2
    assert layer["experts"][0] == [0, 2] and layer["weights"][0] == [0.7, 0.3]
    assert layer["experts"][3] == [2, 1] and layer["weights"][3] == [0.6, 0.4]
    assert layer["weights"][1] == [1.0, 0.0], "a dropped choice has no weight"


def test_tiles_of_an_image_count_on():
    record = RoutingRecord()
    record.add({0: torch.ones(6, 2)}, slice(0, 6))
    names = record.table(prompt(*[IMAGE_TOKEN] * 6, tiles=(2, 1)), TextStream(Letters()))["tokens"]
    assert [(name["image"], name["patch"]) for name in names] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]


def test_pictures_that_are_not_plain_are_named():
    record = RoutingRecord()
    record.add({0: torch.ones(2, 2)}, slice(0, 2))
    asked = replace(prompt(IMAGE_TOKEN, IMAGE_TOKEN, tiles=(1, 1)), modalities=("image", "depth"))
    assert record.table(asked, TextStream(Letters()))["modalities"] == ["image", "depth"]
    assert "modalities" not in record.table(replace(asked, modalities=()), TextStream(Letters()))
