"""Anchors: pairs about the quickstart's own pictures, the truth preferred to another answer of its type."""

import json

import pytest

PROGRAM = "anchors"

PAIR = {
    "id": "p",
    "images": ["two/0.png"],
    "prompt": [{"from": "human", "value": "<image>\nred?"}],
    "chosen": "yes",
    "rejected": "no",
}


@pytest.fixture
def made(tmp_path):
    """(pairs, their image folder, a quickstart's data of four pictures with a question of either type each)"""
    rows = []
    for number, (color, there) in enumerate((("red", "yes"), ("blue", "no"), ("green", "yes"), ("red", "no"))):
        texts = ["<image>\nwhat color?", color, "is there a circle?", there]
        turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
        rows.append({"id": str(number), "image": f"one/{number}.png", "conversations": turns, "tag": "color+existence"})
    for image in ("pictures/two/0.png", *(f"data/images/{row['image']}" for row in rows)):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / image).write_text(image)
    (tmp_path / "data/conversations.json").write_text(json.dumps(rows))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR | {"id": name}) + "\n" for name in "ab"))
    return tmp_path / "pairs.jsonl", tmp_path / "pictures", tmp_path / "data"


def test_an_anchor_prefers_what_is_true_to_another_answer_of_its_type(program, made, tmp_path):
    counts = program.write_anchored(*made, tmp_path / "out", share=3)
    rows = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert counts == {"pairs": 2, "anchors": 6} and rows[:2] == [PAIR | {"id": name} for name in "ab"]
    asked = program.training_questions(made[2])
    types = {"color": {"red", "blue", "green"}, "existence": {"yes", "no"}}
    drawn = rows[2:]
    assert len({json.dumps([row["images"], row["prompt"]]) for row in drawn}) == len(drawn) == 6
    for row in drawn:
        question = {"image": row["images"][0], "question": row["prompt"][0]["value"].removeprefix("<image>\n")}
        (kind,) = [known["type"] for known in asked if known == known | question | {"answer": row["chosen"]}]
        assert row["rejected"] in types[kind] - {row["chosen"]}


def test_the_pictures_of_pairs_and_anchors_lie_below_one_folder(program, made, tmp_path):
    program.write_anchored(*made, tmp_path / "out", share=4)
    rows = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    pictures = {image: tmp_path / "out/images" / image for row in rows for image in row["images"]}
    assert len(pictures) == 5 and not any(path.is_symlink() for path in pictures.values())
    assert pictures["two/0.png"].read_text() == "pictures/two/0.png"
    assert pictures["one/1.png"].read_text() == "data/images/one/1.png"


def test_the_same_seed_draws_the_same(program, made, tmp_path):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        program.write_anchored(*made, tmp_path / name, seed=seed, share=2)
    first, again, other = ((tmp_path / name / "pairs.jsonl").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
