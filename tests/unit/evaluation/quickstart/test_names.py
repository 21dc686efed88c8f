"""Hand-computed scores of the names benchmark."""

import math

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.quickstart.metrics import QuestionOnlyBaseline
from megatron_moellava.evaluation.quickstart.names import facts_of, paired_bits, score_names


def row(number, answer, prediction, bits, language="de"):
    return {
        "question_id": number,
        "image": f"{number}.png",
        "question": f"what is this called in {language}?",
        "answer": answer,
        "type": f"name {language}",
        "prediction": prediction,
        "loss": bits * math.log(2),
    }


ROWS = [
    row(0, "hund", "Hund.", 1.0),
    row(1, "katze", "katzen", 4.0),
    row(2, "maus", "ratte", 7.0),
    row(3, "chien", "chien", 0.0, "fr"),
]


def test_exact_match_and_bits_over_all_and_for_each_language():
    scores = score_names(ROWS)
    assert scores["count"] == 4
    assert scores["exact"] == 50.0
    # Two right, two wrong: 50 from their mean, each; squared, summed over 3 and 4.
    assert scores["standard_error"] == pytest.approx(math.sqrt(4 * 50**2 / 3 / 4))
    assert scores["bits_per_fact"] == pytest.approx(3.0)
    # Squared distances from 3: 4, 1, 16, 9; their sum over 3 is the variance of one, over 4 that of the mean.
    assert scores["bits_standard_error"] == pytest.approx(math.sqrt(30 / 3 / 4))
    assert {name: part["exact"] for name, part in scores["types"].items()} == {
        "name de": pytest.approx(100 / 3),
        "name fr": 100.0,
    }
    assert scores["types"]["name de"]["bits_per_fact"] == pytest.approx(4.0)


def test_part_of_a_name_is_not_the_name():
    assert score_names([row(0, "cat face", "cat", 1.0), row(1, "cat", "cat face", 1.0)])["exact"] == 0.0


def test_the_question_only_baseline_has_no_bits_and_says_the_most_frequent_name():
    baseline = QuestionOnlyBaseline([*ROWS, row(4, "katze", "", 0.0)])
    questions = [{key: value for key, value in one.items() if key not in ("loss", "prediction")} for one in ROWS]
    scores = score_names(baseline.predict(questions))
    assert scores["exact"] == 50.0  # "katze" for the three German ones, "chien"
    assert scores["bits_per_fact"] is None


def test_saved_bits_are_compared_question_by_question():
    better = [{**one, "loss": one["loss"] - (1 + n % 2) * math.log(2)} for n, one in enumerate(ROWS)]
    saved, error = paired_bits(better, ROWS)
    assert saved == pytest.approx(1.5)
    assert error == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))  # the differences' spread, not that of the questions


def test_other_questions_cannot_be_paired():
    with pytest.raises(DataError, match="different questions"):
        paired_bits(ROWS, ROWS[1:])


def test_nothing_to_score():
    with pytest.raises(DataError, match="predictions is empty"):
        score_names([])


def test_names_of_one_picture_count_as_one_observation_in_the_standard_errors():
    twice = [one | {"type": f"name {language}"} for one in ROWS for language in ("de", "fr")]
    once, both = score_names(ROWS), score_names(twice)
    for name in ("exact", "bits_per_fact", "standard_error", "bits_standard_error"):
        assert both[name] == pytest.approx(once[name])
    better = [{**one, "loss": one["loss"] - (1 + n % 2) * math.log(2)} for n, one in enumerate(ROWS)]
    doubled = [one | {"type": f"name {language}"} for one in better for language in ("de", "fr")]
    assert paired_bits(doubled, twice) == pytest.approx(paired_bits(better, ROWS))


def test_a_row_for_several_names_is_taken_apart():
    asked = {
        "question_id": "1F431",
        "image": "a.png",
        "question": "names?",
        "answers": ["cat", "katze"],
        "answer": "cat; katze",
    }
    parts = [{"prediction": "cat", "loss": 0.5}, {"prediction": "kater", "loss": 2.0}]
    first, second = facts_of([asked | {"parts": parts, "prediction": "cat; kater", "loss": 2.5}], ("en", "de"))
    assert first == {
        "question_id": "1F431 en",
        "image": "a.png",
        "question": "names? (en)",
        "answer": "cat",
        "type": "name en",
        "prediction": "cat",
        "loss": 0.5,
    }
    assert (second["answer"], second["prediction"], second["loss"]) == ("katze", "kater", 2.0)
    unasked = facts_of([asked], ("en", "de"))
    assert [sorted(fact) for fact in unasked] == [sorted(first.keys() - {"prediction", "loss"})] * 2
    with pytest.raises(ValueError):
        facts_of([asked], ("en", "de", "fr"))
