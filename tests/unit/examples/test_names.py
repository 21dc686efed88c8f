"""The names benchmark on a few things: what is written, what is held out, and that the same seed gives the same bytes."""

import hashlib
import json
from collections import Counter

import pytest
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.quickstart.metrics import QuestionOnlyBaseline, questions_of
from megatron_moellava.evaluation.quickstart.names import SEPARATOR, facts_of, score_names

THINGS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        from tests.helpers.paths import REPO

        patch.syspath_prepend(str(REPO / "examples/quickstart"))
        from names import write_names

        out = tmp_path_factory.mktemp("names")
        write_names(out, things=THINGS, views=2, turns=3, seed=1)
    return out


@pytest.fixture(scope="module")
def at_once(data, tmp_path_factory):
    """The same things, asked for all names at once as in the quickstart."""
    from names import write_names

    out = tmp_path_factory.mktemp("at_once")
    write_names(out, things=THINGS, views=2, at_once=True, seed=1)
    return out


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows_of(data):
    return json.loads((data / "names.json").read_text())


def asked_of(data):
    return [json.loads(line) for line in (data / "names_test.jsonl").open()]


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(data, tmp_path):
    from names import write_names

    write_names(tmp_path / "again", things=THINGS, views=2, turns=3, seed=1)
    write_names(tmp_path / "other", things=THINGS, views=2, turns=3, seed=2)
    assert digests(tmp_path / "again") == digests(data)
    assert digests(tmp_path / "other") != digests(data)


def test_every_thing_has_its_name_in_every_language_from_every_training_picture(data):
    from names import LANGUAGES, question

    known = {}
    for row in questions_of(rows_of(data)):
        known.setdefault(row["question"], set()).add(row["answer"])
    assert {question: len(names) for question, names in known.items()} == {
        question(language): THINGS for language in LANGUAGES
    }
    asked = Counter(row["image"] for row in rows_of(data) for _ in row["conversations"][::2])
    assert len(asked) == 2 * THINGS
    assert set(asked.values()) == {len(LANGUAGES)}


def test_the_names_are_those_that_people_use():
    from names import read_things

    cat = next(thing for thing in read_things() if thing.code == "1F431")
    assert cat.names == {
        "en": "cat face",
        "de": "katzengesicht",
        "es": "cara de gato",
        "fr": "tête de chat",
        "it": "muso di gatto",
        "pt": "rosto de gato",
        "id": "wajah kucing",
        "tr": "kedi yüzü",
    }


def test_all_emoji_without_skin_tones_have_a_picture_and_a_name_of_their_own():
    from names import LANGUAGES, read_things

    things = read_things()
    assert len(things) > 1900
    for language in LANGUAGES:
        assert len({thing.names[language] for thing in things}) == len(things)
    assert not [thing.code for thing in things if "1F3FB" in thing.code]


def test_no_test_picture_is_a_training_picture(data):
    train = {row["image"] for row in rows_of(data)}
    test = {row["image"] for row in asked_of(data)}
    assert not train & test
    pixels = {name: Image.open(data / "images" / name).tobytes() for name in train | test}
    assert len(set(pixels.values())) == len(pixels) == 3 * THINGS


def test_languages_take_turns_in_the_test_questions(data):
    counts = Counter(row["type"] for row in asked_of(data))
    assert set(counts.values()) == {2 * THINGS // 8}
    truth = {(row["image"].split("/")[-1][:-6], row["question"]): row["answer"] for row in questions_with_image(data)}
    for row in asked_of(data):
        assert truth[row["image"].split("/")[-1][:-6], row["question"]] == row["answer"]


def questions_with_image(data):
    for row in rows_of(data):
        for question in questions_of([row]):
            yield question | {"image": row["image"]}


def test_the_words_alone_name_nothing(data):
    baseline = QuestionOnlyBaseline(questions_of(rows_of(data)))
    assert score_names(baseline.predict(asked_of(data)))["exact"] <= 100 / THINGS + 10


def test_all_names_at_once_are_asked_of_the_same_pictures(data, at_once):
    from names import LANGUAGES, read_things

    names = {thing.code: [thing.names[language] for language in LANGUAGES] for thing in read_things()}
    known = {row["image"]: row["answer"].split(SEPARATOR) for row in questions_with_image(at_once)}
    assert len(known) == len(rows_of(at_once)) == 2 * THINGS
    for image, answer in known.items():
        assert answer == names[image.split("/")[-1][: -len("-0.png")]]
    asked = asked_of(at_once)
    assert {row["image"] for row in asked} == {row["image"] for row in asked_of(data)} and len(asked) == THINGS
    for row in asked:
        assert row["image"] == f"names/test/{row['question_id']}-2.png"
        assert row["answers"] == names[row["question_id"]] == row["answer"].split(SEPARATOR)
        assert row["question"] == questions_of(rows_of(at_once))[0]["question"]


def test_no_name_has_what_stands_between_them():
    from names import read_things

    assert not [name for thing in read_things() for name in thing.names.values() if SEPARATOR in name]


def test_the_words_alone_name_one_thing_of_all_at_once(at_once):
    from names import LANGUAGES
    from names_report import trained_rows

    baseline = QuestionOnlyBaseline(facts_of(trained_rows(rows_of(at_once)), LANGUAGES))
    score = score_names(baseline.predict(facts_of(asked_of(at_once), LANGUAGES)))
    assert score["exact"] == pytest.approx(100 / THINGS) and score["count"] == 8 * THINGS


def test_the_picture_shows_the_thing_on_a_light_background(data):
    for row in asked_of(data):
        picture = Image.open(data / "images" / row["image"])
        assert picture.mode == "RGB" and picture.size == (72, 72)
        colors = picture.getcolors(maxcolors=72 * 72)
        assert len(colors) > 3
        assert min(picture.getpixel((0, 0))) >= 200


def test_attribution_and_licence_lie_beside_the_pictures(data):
    text = (data / "images/names/ATTRIBUTION.md").read_text()
    for needed in ("OpenMoji", "CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/", "Unicode License v3"):
        assert needed in text
    assert (data / "images/names/LICENSE-CC-BY-SA-4.0.txt").read_text().startswith("Attribution-ShareAlike 4.0")


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    import importlib.util

    from names import write_names

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "resvg_py" else found(name))
    with pytest.raises(DataError, match=r"needs resvg-py, not installed here; pip install"):
        write_names(tmp_path / "out")
    assert not (tmp_path / "out").exists()
