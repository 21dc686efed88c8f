"""Compositions of easy-VQA's shapes: what is written is what is there, and no picture of the test is of training pixels."""

import hashlib
import importlib
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

PROGRAM = "compositions"

RGB = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "black": (0, 0, 0), "yellow": (255, 255, 0)}
BACKGROUND = (240, 250, 245)


@pytest.fixture
def data(tmp_path):
    """A quickstart's data with five pictures in either split: a circle or a rectangle of each colour."""
    rows, tests = [], []
    for split in ("train", "test"):
        folder = tmp_path / "data" / "images" / "easy_vqa" / split
        folder.mkdir(parents=True)
        for number, color in enumerate(RGB):
            form = "rectangle" if number % 2 else "circle"
            picture = Image.new("RGB", (64, 64), BACKGROUND)
            draw = ImageDraw.Draw(picture)
            box = (30, 20, 41 if split == "train" else 45, 31)
            (draw.rectangle if number % 2 else draw.ellipse)(box, fill=RGB[color])
            image = f"easy_vqa/{split}/{number}.png"
            picture.save(tmp_path / "data" / "images" / image)
            asked = [("what color is the shape?", color, "color"), ("what shape is there?", form, "shape")]
            tests += [
                {"image": image, "question": question, "answer": answer, "type": kind}
                for question, answer, kind in asked
                if split == "test"
            ]
            turns = [
                {"from": role, "value": text}
                for question, answer, _ in asked
                for role, text in (("human", question), ("gpt", answer))
            ]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            if split == "train":
                rows.append({"id": image, "image": image, "conversations": turns, "tag": "color+shape"})
    rows.append({"id": "text", "conversations": [], "tag": "text"})
    (tmp_path / "data" / "conversations.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
    return tmp_path / "data"


def test_a_poll_asks_of_all_that_is_there_and_of_as_many_others(program):
    here = {"red shape", "blue shape", "circle"}
    found = program.polls(here, random.Random(0))
    assert Counter(kind for _, kind in found) == {"present": 3, "absent": 3}
    assert {thing for thing, kind in found if kind == "present"} == here
    assert len(dict(found)) == 6 and {thing for thing, _ in found} <= set(program.all_things())


def test_where_most_things_are_there_fewer_are_missing(program):
    here = set(program.all_things()) - {"teal shape", "circle"}
    absent = {thing for thing, kind in program.polls(here, random.Random(0)) if kind == "absent"}
    assert absent == {"teal shape", "circle"} and len(here) == 9


def test_a_picture_holds_the_shapes_that_its_polls_say_pixel_by_pixel(program, data, tmp_path):
    counts = program.write_compositions(data, tmp_path / "out", train=6, test=5, ordinary=4, seed=1)
    tests = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert counts["present existence"] + counts["absent existence"] + 4 == len(tests)
    for image in {test["image"] for test in tests if test["type"] != "ordinary"}:
        pixels = np.asarray(Image.open(tmp_path / "out" / "images" / image))
        assert pixels.shape == (program.SIDE, program.SIDE, 3)
        drawn = {color for color, rgb in RGB.items() if (pixels == rgb).all(axis=2).any()}
        said = {test["question"] for test in tests if test["image"] == image and test["answer"] == "yes"}
        forms = {"rectangle" if color in ("blue", "black") else "circle" for color in drawn}
        assert said == {f"is there a {thing}?" for thing in [*(f"{color} shape" for color in drawn), *forms]}
        widest = max(np.ptp(np.flatnonzero((pixels == RGB[color]).all(axis=2).any(axis=0))) for color in drawn)
        assert widest == 15  # of the pictures held out; those of training are 11 wide


def test_the_rows_to_make_pairs_of_are_polls_of_training_pictures(program, data, tmp_path):
    from megatron_moellava.evaluation.preference_pairs import questions_of

    counts = program.write_compositions(data, tmp_path / "out", train=6, test=2, ordinary=4, seed=1)
    rows = json.loads((tmp_path / "out" / "polls.json").read_text())
    assert len(rows) == counts["polls"] and len({row["image"] for row in rows}) == 6
    assert all(len(row["conversations"]) == 2 for row in rows)
    assert Counter(row["conversations"][1]["value"] for row in rows)["yes"] >= len(rows) // 2
    said = {(one.images[0].name, one.turns[0].text): one.truth for one in questions_of(enumerate(rows), "polls.json")}
    assert len(said) == len(rows) and all(len(one.turns) == 1 for one in questions_of(enumerate(rows), "polls.json"))
    pixels = np.asarray(Image.open(tmp_path / "out" / "images" / rows[0]["image"]))
    drawn = [rgb for rgb in RGB.values() if (pixels == rgb).all(axis=2).any()]
    assert max(np.ptp(np.flatnonzero((pixels == rgb).all(axis=2).any(axis=0))) for rgb in drawn) == 11


def test_ordinary_questions_come_with_their_pictures(program, data, tmp_path):
    program.write_compositions(data, tmp_path / "out", train=1, test=1, ordinary=4, seed=1)
    tests = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    ordinary = [test for test in tests if test["type"] == "ordinary"]
    known = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert len(ordinary) == 4
    for test in ordinary:
        assert any(test == row | {"type": "ordinary"} for row in known)
        assert (tmp_path / "out" / "images" / test["image"]).read_bytes() == (
            data / "images" / test["image"]
        ).read_bytes()


def test_the_same_seed_gives_the_same_bytes(program, data, tmp_path):
    def digests(folder):
        program.write_compositions(data, folder, train=3, test=2, ordinary=2, seed=4)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return [(str(file.relative_to(folder)), hashlib.sha256(file.read_bytes()).digest()) for file in files]

    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize(
    ("module", "options"), [("compositions", ["--data"]), ("anchors", ["--pairs", "--images", "--data"])]
)
def test_what_the_quickstart_has_not_written_is_named(module, options, program, tmp_path, monkeypatch, capsys):
    given = [part for option in options for part in (option, str(tmp_path / "none"))]
    monkeypatch.setattr("sys.argv", ["program", *given, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "conversations.json missing; run `make quickstart PRESET=fast` first" in said
    assert not (tmp_path / "out").exists()
