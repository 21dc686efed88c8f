"""Hand-computed scores of the quickstart's questions, the question-only baseline and the blank-picture check."""

import pytest

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.quickstart.metrics import (
    QuestionOnlyBaseline,
    compare_blanked,
    questions_of,
    score_quickstart,
)


def row(question, answer, kind, prediction=""):
    return {"question": question, "answer": answer, "type": kind, "prediction": prediction}


def test_accuracy_per_type_is_exact_match_after_case_and_full_stop():
    scores = score_quickstart(
        [
            row("what is it?", "circle", "shape", "Circle."),
            row("what is it?", "circle", "shape", "a circle"),
            row("what color?", "red", "color", "red"),
            row("what color?", "red", "color", "reddish"),
            row("what color?", "teal", "color", " teal "),
        ]
    )
    assert scores["accuracy"] == pytest.approx(60.0)
    assert scores["types"] == {
        "color": {"count": 3, "accuracy": pytest.approx(200.0 / 3.0)},
        "shape": {"count": 2, "accuracy": 50.0},
    }
    assert scores["standard_error"] == pytest.approx(100.0 * (0.6 * 0.4 / 5) ** 0.5)
    assert scores["existence"] is None


def test_existence_f1_weighs_yes_and_no_half_each():
    # 1 yes (found), 4 no (one called yes). Weighted: TP = 0.5, FN = 0, FP = 0.5 / 4 = 0.125, TN = 0.375.
    rows = [row("is there a circle?", "yes", "existence", "Yes.")]
    rows += [row("is there a 3?", "no", "digits existence", text) for text in ("no", "No.", "There is not", "yes")]
    everything = score_quickstart(rows)
    assert everything["types"]["existence"] == {"count": 1, "accuracy": 100.0, "f1": 100.0}
    scores = everything["existence"]
    assert scores["f1"] == pytest.approx(100.0 * 1.0 / 1.125)
    assert scores["accuracy"] == pytest.approx(87.5)
    assert scores["precision"] == pytest.approx(80.0)
    assert scores["recall"] == pytest.approx(100.0)
    assert scores["yes_ratio"] == pytest.approx(62.5)
    assert (scores["yes"], scores["no"], scores["unclear"]) == (1, 4, 1)


def test_always_yes_scores_two_thirds_whatever_the_balance():
    rows = [row("q", answer, "existence", "yes") for answer in ["yes"] * 9 + ["no"]]
    assert score_quickstart(rows)["existence"]["f1"] == pytest.approx(200.0 / 3.0)


def test_existence_truth_must_be_yes_or_no():
    with pytest.raises(DataError, match="'maybe'"):
        score_quickstart([row("q", "maybe", "existence", "yes")])


def test_empty_predictions_are_an_error():
    with pytest.raises(DataError, match="empty"):
        score_quickstart([])


def test_question_only_baseline_uses_wording_then_type_then_everything():
    train = [row("What is it?", "circle", "shape")] * 2 + [row("what is it", "square", "shape")]
    train += [row("what color?", "red", "color")] * 2
    baseline = QuestionOnlyBaseline(train)
    assert baseline(row("what  is it ?", "square", "shape")) == "circle"
    assert baseline(row("new wording", "", "color")) == "red"
    assert baseline(row("new wording", "", "unheard of")) == "circle"
    assert baseline.predict([row("what color?", "blue", "color")])[0]["prediction"] == "red"


def test_training_conversations_become_rows_and_text_only_ones_do_not_count():
    conversations = [
        {
            "image": "a.png",
            "tag": "shape+existence",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat is it?"},
                {"from": "gpt", "value": "circle"},
                {"from": "human", "value": "is there a square?"},
                {"from": "gpt", "value": "no"},
            ],
        },
        {"tag": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    ]
    assert questions_of(conversations) == [
        {"question": "what is it?", "answer": "circle", "type": "shape"},
        {"question": "is there a square?", "answer": "no", "type": "existence"},
    ]


def test_blanked_pictures_must_fall_to_the_baseline():
    def answered(right):
        return [row("q", "a", "shape", "a" if number < right else "b") for number in range(100)]

    fallen = compare_blanked(answered(95), answered(52), answered(50))
    assert fallen == {"seen": 95.0, "blanked": 52.0, "baseline": 50.0, "margin": 15.0, "falls_to_baseline": True}
    assert not compare_blanked(answered(95), answered(70), answered(50))["falls_to_baseline"]
    with pytest.raises(DataError, match="same rows"):
        compare_blanked(answered(95), answered(50)[:-1], answered(50))
