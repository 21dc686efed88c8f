"""Several things in one picture: boxes to the pixel, truths of the questions, and POPE's polls over them."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import REPO

TRAIN, TEST = 6, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples/quickstart"))
        from names import read_things
        from scenes import write_scenes

        things = read_things(60, seed=3)
        out = tmp_path_factory.mktemp("scenes")
        return out, things, write_scenes(out, things, train=TRAIN, test=TEST, seed=1)


def boxes_of(out):
    return [json.loads(line) for line in (out / "scenes_boxes.jsonl").open()]


def test_a_box_holds_all_pixels_of_its_thing_and_no_row_or_column_more(made):
    """Against the picture itself: outside the boxes there is background alone, and every edge of a box is touched."""
    out, _, _ = made
    for scene in boxes_of(out):
        pixels = np.asarray(Image.open(out / "images" / scene["image"])).astype(int)
        background = Counter(map(tuple, pixels.reshape(-1, 3).tolist())).most_common(1)[0][0]
        inked = (pixels != background).any(axis=2)
        outside = inked.copy()
        for thing in scene["objects"]:
            left, top, right, bottom = thing["box"]
            inside = inked[top:bottom, left:right]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            outside[top:bottom, left:right] = False
            assert thing["place"] == ("top " if top < 36 else "bottom ") + ("left" if left < 36 else "right")
        assert not outside.any()


def test_truths_follow_from_the_boxes(made):
    out, _, _ = made
    scenes = {scene["image"]: scene["objects"] for scene in boxes_of(out)}
    for line in (out / "scenes_test.jsonl").open():
        row = json.loads(line)
        here = {thing["name"]: thing["place"] for thing in scenes[row["image"]]}
        question = row["question"].rstrip("?")
        if row["type"] == "scene count":
            assert row["answer"] == ("one", "two", "three", "four")[len(here) - 1]
        elif row["type"] == "scene existence":
            assert row["answer"] == ("yes" if question.split(" ", 3)[3] in here else "no")
        elif row["type"] == "scene position":
            assert row["answer"] == here[question.removeprefix("where is the ")]
        else:
            assert here[row["answer"]] == question.removeprefix("what is at the ")


def test_splits_share_no_picture(made):
    out, _, _ = made
    scenes = boxes_of(out)
    assert [scene["image"].split("/")[1] for scene in scenes] == ["train"] * TRAIN + ["test"] * TEST
    pixels = {Image.open(out / "images" / scene["image"]).tobytes() for scene in scenes}
    assert len(pixels) == TRAIN + TEST
    assert {row["image"].split("/")[1] for row in json.loads((out / "scenes.json").read_text())} == {"train"}


def test_a_training_conversation_says_yes_as_often_as_no(made):
    out, _, _ = made
    for row in json.loads((out / "scenes.json").read_text()):
        answers = Counter(turn["value"] for turn in row["conversations"][1::2])
        assert answers["yes"] == answers["no"] == 1


def test_popes_polls_ask_for_as_many_absent_things(made):
    from megatron_moellava.evaluation.tasks import get_task

    out, _, _ = made
    questions = get_task("names_pope").read(out)
    held = {scene["image"]: {thing["name"] for thing in scene["objects"]} for scene in boxes_of(out)}
    counts = Counter((question.fields["category"], question.fields["answer"]) for question in questions)
    assert set(counts.values()) == {sum(len(held[image]) for image in held if "/test/" in image)}
    assert len(counts) == 6
    for question in questions:
        thing = question.text.removeprefix("is there a ").removesuffix("?")
        assert (thing in held[question.fields["image"]]) == (question.fields["answer"] == "yes")


def test_no_name_reads_as_a_negation(made):
    from scenes import NEGATION

    out, things, _ = made
    assert any(NEGATION.search(thing.names["en"]) for thing in things), "these things would not show it"
    for line in (out / "scenes_test.jsonl").open():
        assert not NEGATION.search(json.loads(line)["question"])


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    from scenes import write_scenes

    out, things, _ = made
    write_scenes(tmp_path, things, train=TRAIN, test=TEST, seed=1)
    for path in out.rglob("*.*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes()
