"""The judged benchmarks against a real HTTP server on loopback that speaks OpenAI's chat completions."""

import pytest

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.judge import JudgeError
from megatron_moellava.evaluation.scorers.judged import read_grade, read_review
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures


def answered(name, data, texts, judge):
    task = get_task(name)
    return Answered(
        folder=data / task.folder,
        work=data / "work",
        name="ours",
        questions=task.read(data),
        texts=texts,
        judge=judge,
    )


def test_llava_bench_is_the_ratio_of_the_mean_reviews(tmp_path, stub):
    miniatures.llava_bench(tmp_path)
    server = stub(["8 6\nThe first...", "10,9\n...", "7 5"])
    result = get_task("llava_bench").score(answered("llava_bench", tmp_path, ["a0", "a1", "a2"], server.judge()))
    assert result.value == pytest.approx(100.0 * 20 / 25)
    assert result.details["llava_bench_conv"] == pytest.approx(100.0 * 11 / 15)
    assert result.details["llava_bench_detail"] == pytest.approx(90.0)
    assert result.details["unreadable reviews"] == 0
    assert "judge stub-1 at 127.0.0.1" in result.notes[0]
    assert "our wording" in result.notes[0]
    assert "the original used gpt-3.5-turbo: not comparable" in result.notes[0]
    asked = server.requests[2]
    assert (asked["path"], asked["model"], asked["temperature"]) == ("/v1/chat/completions", "asked-for", 0.2)
    words = asked["messages"][1]["content"]
    assert words.startswith(
        "[Context]\nA lake.\nA hut.\n\n[Question]\nAnd this?\n\n[Assistant 1]\nreference 2\n\n[End of"
    )
    assert "[Assistant 2]\na2\n\n[End of Assistant 2]\n\n[System]\n" in words


def test_llava_bench_uses_the_published_rules_and_says_so(tmp_path, stub):
    folder = miniatures.llava_bench(tmp_path)
    rule = {"role": "Helper", "prompt": "Rate them."}
    miniatures.write_json(folder / "rule.json", {"llava_bench_conv": rule, "llava_bench_detail": rule})
    server = stub(["8 6", "8 6", "8 6"], model="gpt-3.5-turbo")
    result = get_task("llava_bench").score(answered("llava_bench", tmp_path, ["a"] * 3, server.judge()))
    assert "the original's wording" in result.notes[0]
    assert "not comparable" not in result.notes[0]
    assert server.requests[0]["messages"][1]["content"].endswith("[End of Helper 2]\n\n[System]\nRate them.\n\n")


def test_an_unreadable_review_counts_as_minus_one_like_the_original(tmp_path, stub):
    miniatures.llava_bench(tmp_path)
    server = stub(["8 6", "I cannot say", "7 5"])
    result = get_task("llava_bench").score(answered("llava_bench", tmp_path, ["a"] * 3, server.judge()))
    assert result.value == pytest.approx(100.0 * (6 - 1 + 5) / (8 - 1 + 7))
    assert result.details["unreadable reviews"] == 1
    assert result.details["without them"] == pytest.approx(100.0 * 11 / 15)


def test_reviews_are_not_paid_for_twice_but_a_changed_answer_is_judged_again(tmp_path, stub):
    miniatures.llava_bench(tmp_path)
    server = stub(["8 6", "8 6"] + [503] * 3)
    with pytest.raises(JudgeError, match=r"HTTP 503.*run again"):
        get_task("llava_bench").score(answered("llava_bench", tmp_path, ["a", "b", "c"], server.judge(retries=2)))
    server.script = ["4 4"]
    result = get_task("llava_bench").score(answered("llava_bench", tmp_path, ["a", "b", "c"], server.judge()))
    assert result.value == pytest.approx(100.0 * 16 / 20)
    assert len(server.requests) == 6
    server.script = ["1 1"]
    result = get_task("llava_bench").score(answered("llava_bench", tmp_path, ["a", "b", "changed"], server.judge()))
    assert result.value == pytest.approx(100.0 * 13 / 17)
    assert len((tmp_path / "work" / "reviews.jsonl").read_text().splitlines()) == 4


def test_mm_vet_means_the_grades_and_retries_what_is_no_number(tmp_path, stub):
    miniatures.mm_vet(tmp_path)
    server = stub(["0.5", "I think", "0.9 because"], model="gpt-4-0613")
    result = get_task("mm_vet").score(answered("mm_vet", tmp_path, ["an a", "a d"], server.judge()))
    assert result.value == pytest.approx(70.0)
    assert result.details == {"ocr": pytest.approx(90.0), "rec": pytest.approx(70.0), "unreadable grades": 0}
    first, second, third = server.requests
    assert first["messages"][0]["content"].endswith("\nQuestion 0? | a <AND> b | an a | ")
    assert (first["temperature"], first["max_tokens"]) == (0.0, 3)
    assert third["messages"][0]["content"] == second["messages"][0]["content"] + (
        "\nPredict the correctness of the answer (digit): "
    )
    assert "our wording" in result.notes[0]
    assert "not comparable" not in result.notes[0]


def test_mm_vet_gives_up_after_five_replies_and_warms_up_on_the_way(tmp_path, stub):
    miniatures.mm_vet(tmp_path)
    server = stub(["?", "?", "7", "?", "?", "1.0"])
    result = get_task("mm_vet").score(answered("mm_vet", tmp_path, ["x", "y"], server.judge()))
    assert [request["temperature"] for request in server.requests] == [0.0, 0.0, 0.5, 1.0, 1.5, 0.0]
    assert (result.value, result.details["unreadable grades"]) == (50.0, 1)


def test_without_a_judge_there_is_no_score(tmp_path):
    miniatures.mm_vet(tmp_path)
    assert get_task("mm_vet").score(answered("mm_vet", tmp_path, ["x", "y"], None)) is None


def test_a_review_torn_by_a_kill_is_asked_again(tmp_path, stub):
    miniatures.mm_vet(tmp_path)
    server = stub(["0.5", "0.9"])
    get_task("mm_vet").score(answered("mm_vet", tmp_path, ["x", "y"], server.judge()))
    path = tmp_path / "work" / "grades.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    server.script = ["0.1"]
    assert get_task("mm_vet").score(answered("mm_vet", tmp_path, ["x", "y"], server.judge())).value == pytest.approx(
        30.0
    )


@pytest.mark.parametrize(
    ("review", "pair"),
    [("8 7.5\nx", [8, 7.5]), ("8,7", [8, 7]), ("8  7", [-1, -1]), ("8 7 6", [-1, -1]), ("Scores: 8 7", [-1, -1])],
)
def test_review_line_is_two_numbers(review, pair):
    assert read_review(review) == pair


@pytest.mark.parametrize(("text", "grade"), [("0.4", 0.4), ("1.0 |", 1.0), ("1.5", None), ("none", None), ("", None)])
def test_grade_is_a_number_between_zero_and_one(text, grade):
    assert read_grade(text) == grade
