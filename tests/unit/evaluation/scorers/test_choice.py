"""Letters of options on miniatures of ScienceQA, SEED-Bench and MMBench, against scores counted by hand."""

import pytest

from megatron_moellava.evaluation.tasks import get_task
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


def test_science_qa_scores_questions_with_a_picture(tmp_path):
    miniatures.science_qa(tmp_path)
    result = score("scienceqa", tmp_path, ["B. y", "The answer is C.", "A"])
    assert (result.value, result.count) == (50.0, 2)
    assert result.details == {"accuracy over all": pytest.approx(200 / 3), "asked": 3, "unreadable": 0}
    # A letter beyond the choices is wrong, and so is a text without a letter.
    result = score("scienceqa", tmp_path, ["C", "the first", "A"])
    assert (result.value, result.details["unreadable"]) == (0.0, 1)


def test_seed_compares_the_text_itself(tmp_path):
    miniatures.seed(tmp_path)
    result = score("seed", tmp_path, ["A", "B.", "C"])
    assert result.value == pytest.approx(200 / 3)
    assert result.details == {"Instance": 50.0, "Scene": 100.0, "image": 50.0, "video": 100.0}


def test_mmbench_one_round_and_all_rounds(tmp_path):
    miniatures.mmbench(tmp_path)
    once = score("mmbench", tmp_path, ["B", "B"])
    assert (once.value, once.metric) == (50.0, "accuracy, one round (%)")
    # Question 5 is cat, dog, cow with dog right: it is shown as B, then A, then C. Question 7: A, then B.
    right = ["B", "A", "C", "A", "B"]
    assert score("mmbench", tmp_path, right, circular=True).value == 100.0
    result = score("mmbench", tmp_path, ["B", "B", "C", "A", "B"], circular=True)
    assert (result.value, result.metric, result.details["one round"]) == (50.0, "circular accuracy (%)", 100.0)
    assert "not the server's" in result.notes[0]


def test_mmbench_groups_the_rotated_copies_of_the_published_table(tmp_path):
    table = miniatures.mmbench(tmp_path) / get_task("mmbench").questions
    header, first = table.read_text().splitlines()[:2]
    copy = first.replace('"5"', '"1000005"').replace('"cat"\t"dog"\t"cow"', '"dog"\t"cow"\t"cat"').replace('"B"', '"A"')
    other = first.replace('"5"', '"6"')
    table.write_text("\n".join([header, first, copy, other]) + "\n")
    result = score("mmbench", tmp_path, ["B", "B", "B"])  # the copy is answered wrong, so question 5 is
    assert (result.value, result.details) == (50.0, {"one round": 100.0, "questions": 2})
    assert score("mmbench", tmp_path, ["B", "A", "B"]).value == 100.0
    assert len(get_task("mmbench").read(tmp_path, circular=True)) == 6  # our own rotations replace the copies


def test_mmbench_options_end_at_the_first_missing_one(tmp_path):
    table = miniatures.mmbench(tmp_path) / get_task("mmbench").questions
    table.write_text(table.read_text().replace('"dog"', '"None"'))
    assert get_task("mmbench").read(tmp_path)[0].text.endswith("Which one?\nA. cat")


def test_mmbench_without_published_answers_is_left_to_the_server(tmp_path):
    miniatures.mmbench(tmp_path, answers=("", ""))
    assert score("mmbench", tmp_path, ["A", "B"]) is None
