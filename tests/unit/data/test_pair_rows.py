"""Rows of preferences: our own layout, those of published data sets, and what is refused."""

import json

import pytest

from megatron_moellava.data.pair_rows import parse_pair
from megatron_moellava.data.sample import BadSample

OURS = {"id": "a", "image": "a.png", "prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "An animal."},
    {"from": "human", "value": "Which?"},
]


def spoken(record: dict) -> tuple[list, list]:
    return tuple([(turn.role, turn.text) for turn in sample.turns] for sample in parse_pair(record, origin="x row 0"))


def said(*texts: str) -> list:
    return [(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


ONE_TURN = (said("<image>\nWhat is it?", "A cat."), said("<image>\nWhat is it?", "A dog."))
LAYOUTS = {
    "ours": (OURS, ONE_TURN),
    "ours, placed": (OURS | {"prompt": "<image>\nWhat is it?"}, ONE_TURN),
    "messages": (
        {
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
            "chosen": [{"role": "assistant", "content": "A cat."}],
            "rejected": [{"role": "assistant", "content": "A dog."}],
        },
        ONE_TURN,
    ),
    "MMPR": (
        {"image": "a.png", "question": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."},
        ONE_TURN,
    ),
    "RLAIF-V": (
        {
            "ds_name": "RLAIF-V",
            "image": {"bytes": "data:image/png;base64,AA==", "path": "0.jpg"},
            "question": "What is it?",
            "chosen": "A cat.",
            "rejected": "A dog.",
            "origin_dataset": "COCO",
            "origin_split": '{"model": "x"}',
            "idx": "3",
            "image_path": "0.jpg",
        },
        ONE_TURN,
    ),
    "RLHF-V": (
        {
            "ds_name": "RLHF-V",
            "image": "a.png",
            "text": json.dumps({"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}),
            "origin_dataset": "LCS-558K",
            "origin_split": '{"model": "x"}',
            "idx": 0,
            "image_path": "a.png",
        },
        ONE_TURN,
    ),
    "LLaVA-RLHF": (
        {
            "id": "7",
            "image": "a.png",
            "conversations": [*TURNS, {"from": "gpt", "value": "A bird."}],
            "output_1": {"from": "llava", "value": "A dog."},
            "output_2": {"from": "llava", "value": "A cat."},
            "hallucination": True,
            "preference": 2,
        },
        (
            said("<image>\nWhat is it?", "An animal.", "Which?", "A cat."),
            said("<image>\nWhat is it?", "An animal.", "Which?", "A dog."),
        ),
    ),
    "two pictures": (
        {"images": ["a.png", "b.png"], "prompt": "Compare.", "chosen": "A cat.", "rejected": "A dog."},
        (said("<image>\n<image>\nCompare.", "A cat."), said("<image>\n<image>\nCompare.", "A dog.")),
    ),
    "text alone": (
        {"prompt": "Hello", "chosen": "A cat.", "rejected": "A dog."},
        (said("Hello", "A cat."), said("Hello", "A dog.")),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_as_they_are(name):
    record, expected = LAYOUTS[name]
    assert spoken(record) == expected


def test_both_answers_share_the_pictures():
    chosen, rejected = parse_pair(OURS, origin="x row 0")
    assert chosen.images == rejected.images and [image.name for image in chosen.images] == ["a.png"]
    assert chosen.id == rejected.id == "a"


REFUSED = {
    "pair without a difference": [OURS | {"rejected": " A cat."}],
    "no pair": [
        {"id": "a", "conversations": TURNS},
        OURS | {"rejected": None},
        {"image": "a.png", "text": "What is it?"},
        LAYOUTS["LLaVA-RLHF"][0] | {"preference": 0},
    ],
    "empty answer": [OURS | {"chosen": " "}],
    "malformed turn": [OURS | {"chosen": ["A", "B"]}, OURS | {"chosen": "<image> A cat."}, OURS | {"chosen": 3}],
    "no conversation": [OURS | {"prompt": 3}, OURS | {"prompt": []}],
    "unknown key": [OURS | {"weight": 2}],
    "image count": [OURS | {"prompt": "<image><image> What is it?"}],
    "not a record": [["What is it?"]],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_pair_names_its_row(reason):
    for record in REFUSED[reason]:
        with pytest.raises(BadSample, match="x row 0") as refused:
            parse_pair(record, origin="x row 0")
        assert refused.value.reason == reason


def test_keys_that_a_run_passes_over_do_not_matter():
    parse_pair(OURS | {"weight": 2}, origin="x row 0", ignore_keys=("weight",))
