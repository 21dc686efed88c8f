"""Pairs of a model's own answers: what is asked, how answers are ranked, and which of them are a pair."""

import pytest

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.data.pair_rows import parse_pair
from megatron_moellava.data.sample import BadSample, ImageRef, Turn
from megatron_moellava.evaluation.judge import JudgeError
from megatron_moellava.evaluation.preference_pairs import Asked, exact, pair_of, poll, polls, questions_of, scorer_of
from tests.helpers.data_files import conversation
from tests.helpers.judge_server import StubJudge

ASKED = Asked(
    id="a/1",
    turns=(Turn(role="user", text="<image>\nwhat color is it?"),),
    images=(ImageRef(name="a.png"),),
    truth="red",
)


def rows(*records: dict) -> list:
    return list(enumerate(records))


def test_every_answered_turn_is_a_question_after_the_turns_before():
    record = {"id": "x", "image": "a.png", "conversations": conversation("<image>\nhi", "yes", "and?", "no", "well?")}
    first, second = questions_of(rows(record), "tune.json")
    assert [turn.text for turn in first.turns] == ["<image>\nhi"] and first.truth == "yes"
    assert [turn.text for turn in second.turns] == ["<image>\nhi", "yes", "and?"] and second.truth == "no"
    assert [image.name for image in first.images] == [image.name for image in second.images] == ["a.png"]
    assert len(questions_of(rows(record, record), "tune.json", limit=3)) == 3
    with pytest.raises(BadSample, match=r"tune.json row 0"):
        questions_of(rows({"id": "x"}), "tune.json")


@pytest.mark.parametrize(
    ("fields", "question", "answer", "message"),
    [
        ({"video": "a.mp4"}, "<video>\nis there a circle?", "yes", "a video"),
        ({"image": "a.png", "boxes": [[1, 2, 3, 4]]}, "<image>\nwhere?", "<box>", "boxes"),
        ({"system": "Be brief."}, "is there a circle?", "yes", "a system prompt"),
    ],
)
@pytest.mark.parametrize("read", [questions_of, polls])
def test_a_row_with_what_a_pair_would_lose_is_refused(read, fields, question, answer, message):
    record = {"id": "x", "conversations": conversation(question, answer)} | fields
    with pytest.raises(BadSample, match=rf"tune.json row 0: has {message}.*leave the row out"):
        read(rows(record), "tune.json")


def test_a_poll_asks_of_objects_that_are_known_to_be_there_or_not():
    asked = [("is there a red shape?", "no"), ("is no circle present?", "no"), ("is there a blue shape?", "yes")]
    asked += [("is there not a triangle?", "yes"), ("what shape is it?", "circle")]
    texts = [text for number, (q, a) in enumerate(asked) for text in (q if number else f"<image>\n{q}", a)]
    made = polls(rows({"id": "x", "image": "easy/a.png", "conversations": conversation(*texts)}), "tune.json")
    truths = {
        question.turns[0].text.removeprefix("<image>\nis there a ").rstrip("?"): question.truth for question in made
    }
    assert truths == {"blue shape": "yes", "circle": "yes", "red shape": "no", "triangle": "no"}
    assert {question.images[0].name for question in made} == {"easy/a.png"}


def test_the_best_and_the_worst_are_a_pair_that_stage_4_reads():
    row, unclear = pair_of(ASKED, ["blue", "Red.", "green", "blue", "red", "red"], exact)
    assert unclear == 0
    assert (row["chosen"], row["rejected"]) == ("red", "blue"), "the most frequent of each score"
    chosen, rejected = parse_pair(row, origin="pairs.jsonl row 0")
    assert [turn.text for turn in chosen.turns] == ["<image>\nwhat color is it?", "red"]
    assert rejected.turns[-1].text == "blue" and chosen.images == ASKED.images


def test_answers_that_are_all_as_good_are_no_pair():
    for answers in (["red", "Red"], ["blue", "green"], [], ["", " "]):
        assert pair_of(ASKED, answers, exact) == (None, 0)
    assert pair_of(ASKED, ["blue", "green", "green"], exact, with_truth=True)[0]["rejected"] == "green"
    assert pair_of(ASKED, ["red"], exact, with_truth=True) == (None, 0)


def test_a_blank_answer_is_in_no_pair():
    assert pair_of(ASKED, ["red", " ", "", "red"], exact) == (None, 0)


THERE = Asked(id="p", turns=ASKED.turns, images=(), truth="Yes")


def test_polls_read_yes_and_no_as_pope_does_and_nothing_else():
    said = {
        "yes": 1.0,
        "Yes, there is.": 1.0,
        "YES!": 1.0,
        "no": 0.0,
        "NO": 0.0,
        "there is not": 0.0,
        "yes and no": 0.0,
    }
    said |= {"red": None, "yesterday": None, "well. yes": None, "there isn't": None}
    assert {text: poll(THERE, text) for text in said} == said
    with pytest.raises(DataError, match="use --scorer exact"):
        poll(ASKED, "yes")


def test_an_answer_that_a_poll_cannot_read_is_in_no_pair_and_counted():
    absent = Asked(id="p", turns=ASKED.turns, images=(), truth="no")
    assert pair_of(absent, ["no", "red red", "red red", "the"], poll) == (None, 3)
    row, unclear = pair_of(THERE, ["yes", "red", "red", "no"], poll)
    assert (row["chosen"], row["rejected"], unclear) == ("yes", "no", 2)


def test_a_judge_grades_each_answer_beside_the_truth():
    stub = StubJudge(["9", "about 2.5", "11"])
    scorer = scorer_of("judge", stub.judge())
    assert [scorer(ASKED, text) for text in ("red", "blue", "crimson")] == [9.0, 2.5, 10.0]
    (message,) = stub.requests[0]["messages"]
    assert all(part in message["content"] for part in ("Question: what color is it?", "Reference: red", "Answer: red"))


def test_a_judge_without_a_number_is_said():
    scorer = scorer_of("judge", StubJudge(["good"]).judge())
    with pytest.raises(JudgeError, match="graded a/1 with 'good'"):
        scorer(ASKED, "red")


def test_a_judge_and_its_scorer_go_together():
    with pytest.raises(ConfigError, match="--judge-url and --judge-model"):
        scorer_of("judge", None)
    with pytest.raises(ConfigError, match="--judge-url and --judge-model"):
        scorer_of("exact", StubJudge([]).judge())
    assert scorer_of("exact", None) is exact
