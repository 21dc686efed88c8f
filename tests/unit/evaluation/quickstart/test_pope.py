"""POPE's protocol on hand-made scenes: what is asked, and what the score counts."""

import json
from collections import Counter

import pytest

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.quickstart.pope import read_scenes
from megatron_moellava.evaluation.report import format_table, score_and_submit
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers.evaluation_miniatures import write_image, write_jsonl

ALL = ("circle", "square", "star", "moon")
HELD = {"a.png": {"circle"}, "b.png": {"circle", "square"}, "c.png": {"circle", "square"}, "d.png": {"moon"}}


def row(image, question, answer, kind="existence"):
    return {"image": f"easy/{image}", "question": question, "answer": answer, "type": kind}


@pytest.fixture
def data(tmp_path):
    """Each picture is asked about everything, every second time with a negation; "digits/" knows other things."""
    wordings = (
        "is there a {}?",
        "is no {} present?",
        "is there not a {} in the image?",
        "does the image contain a {}?",
    )
    rows = []
    for image, held in HELD.items():
        for wording, thing in zip(wordings, ALL, strict=True):
            negated = " no " in wording or " not " in wording
            rows.append(row(image, wording.format(thing), "yes" if (thing in held) != negated else "no"))
    rows.append(row("a.png", "what is the color of the shape?", "red", "color"))
    rows.append({"image": "digits/1.png", "question": "is there a 3?", "answer": "yes", "type": "digits existence"})
    write_jsonl(tmp_path / "test.jsonl", rows)
    for image in HELD:
        write_image(tmp_path / "images/easy" / image)
    return tmp_path


def asked(data, category):
    """{picture: {(object, truth)}}"""
    found = {}
    for question in get_task("quickstart_pope").read(data):
        if question.fields["category"] == category:
            thing = question.text.removeprefix("is there a ").removesuffix("?")
            found.setdefault(question.fields["image"], set()).add((thing, question.fields["answer"]))
    return found


@pytest.mark.parametrize("category", ["adversarial", "popular", "random"])
def test_as_many_absent_things_as_present_ones_and_all_truths_hold(data, category):
    polls = asked(data, category)
    assert set(polls) == {f"easy/{image}" for image in HELD}  # the digit's picture has nothing absent: not asked
    for image, held in HELD.items():
        truths = Counter(answer for _, answer in polls[f"easy/{image}"])
        assert truths == {"yes": len(held), "no": len(held)}
        assert all((thing in held) == (answer == "yes") for thing, answer in polls[f"easy/{image}"])


def test_popular_asks_for_the_frequent_and_adversarial_for_what_stands_beside(data):
    assert ("circle", "no") in asked(data, "popular")["easy/d.png"]  # in three of four pictures
    assert ("square", "no") in asked(data, "adversarial")["easy/a.png"]  # beside a circle in two pictures


def test_negations_turn_the_answer_round(tmp_path):
    rows = [
        row("a.png", "is no red shape present?", "no"),
        row("a.png", "does the image not contain a circle?", "yes"),
        row("a.png", "Is there not a square in the image?", "No."),
    ]
    (scene,) = read_scenes(rows, tmp_path)
    assert (scene.present, scene.absent) == ({"red shape", "square"}, {"circle"})


def test_score_is_popes_and_the_table_has_no_row_of_the_paper(data):
    task = get_task("quickstart_pope")
    questions = task.read(data)
    always_yes = Answered(folder=data, work=data / "out", name="m", questions=questions, texts=["yes"] * len(questions))
    record = score_and_submit(task, always_yes, bootstrap_samples=20)
    assert record["value"] == pytest.approx(200 / 3)
    assert record["details"]["random"]["yes_ratio"] == 100.0
    right = [question.fields["answer"] for question in questions]
    truthful = Answered(folder=data, work=data / "out", name="m", questions=questions, texts=right)
    assert score_and_submit(task, truthful, bootstrap_samples=20)["value"] == 100.0
    table = format_table([json.loads(json.dumps(record))])
    assert "50.0 / 66.7 / 100.0" in table and "LLaVA-1.5" not in table
