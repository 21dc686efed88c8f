"""Every locally scored benchmark on a miniature of its published layout, against scores counted by hand."""

import numpy as np
import pytest

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.metrics import Confusion, Score, mean_percent, sum_by_unit
from megatron_moellava.evaluation.scorers.text import soft_accuracies
from megatron_moellava.evaluation.tasks import TASKS, get_task
from tests.helpers import evaluation_miniatures as miniatures


def score(name, data, texts, circular=False, limit=None):
    task = get_task(name)
    questions = task.read(data, circular=circular)[:limit]
    answered = Answered(folder=data / task.folder, work=data / "work", name="ours", questions=questions, texts=texts)
    return task.score(answered)


def test_textvqa_soft_accuracy(tmp_path):
    miniatures.textvqa(tmp_path)
    result = score("textvqa", tmp_path, ["2 dogs", "Acme", "entrance"])
    assert result.value == pytest.approx(100.0 * (0.9 + 0.3 + 0.0) / 3)
    assert result.sums_UK.tolist() == [[pytest.approx(1.2), 2.0], [0.0, 1.0]]  # two pictures, three questions
    assert score("textvqa", tmp_path, ["Dogs", "ACME, Inc", "exit"]).value == pytest.approx(100.0)


@pytest.mark.parametrize(("matches", "credit"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_of_an_answer_given_by_n_of_ten(matches, credit):
    assert soft_accuracies(["a"] * matches + ["b"] * (10 - matches))["a"] == pytest.approx(credit)


def test_gqa_exact_match_over_all_and_by_structure(tmp_path):
    miniatures.gqa(tmp_path)
    result = score("gqa", tmp_path, ["Yes.", "Red", "the left"])
    assert result.value == pytest.approx(200.0 / 3)
    assert result.details == {"binary accuracy": 100.0, "open accuracy": 50.0}
    assert result.sums_UK.tolist() == [[2.0, 2.0], [0.0, 1.0]]


def test_pope_means_the_f1_of_the_categories(tmp_path):
    miniatures.pope(tmp_path)
    # adversarial: right, right (F1 1). popular: yes to both (P 1/2, R 1, F1 2/3). random: no to both (F1 0).
    result = score("pope", tmp_path, ["Yes", "No", "Yes", "yes.", "No", "There is not"])
    assert result.value == pytest.approx(100.0 * (1 + 2 / 3 + 0) / 3)
    popular = {"accuracy": 50.0, "precision": 50.0, "recall": 100.0, "f1": pytest.approx(200 / 3), "yes_ratio": 100.0}
    assert result.details["popular"] == popular
    assert result.details["random"]["yes_ratio"] == 0.0
    assert result.unit == "image"
    assert len(result.sums_UK) == 2


def test_f1_counts_misses_and_false_alarms():
    confusion = Confusion()
    for predicted, truth in ((True, True), (True, False), (False, True), (False, True), (False, False)):
        confusion.add(predicted=predicted, truth=truth)
    # 1 hit, 1 false alarm, 2 misses: precision 1/2, recall 1/3.
    scores = {"accuracy": 40.0, "precision": 50.0, "recall": 100 / 3, "f1": 40.0, "yes_ratio": 40.0}
    assert confusion.percent() == pytest.approx(scores)


def test_pope_refuses_labels_of_another_picture(tmp_path):
    folder = miniatures.pope(tmp_path)
    labels = folder / "coco" / "coco_pope_random.json"
    labels.write_text("\n".join(reversed(labels.read_text().splitlines())))
    with pytest.raises(DataError, match=r"random.*shows 1\.jpg, its label 2\.jpg"):
        score("pope", tmp_path, ["no"] * 6)


def test_mme_adds_accuracy_and_accuracy_plus_per_subtask(tmp_path):
    miniatures.mme(tmp_path)
    # existence: 3 of 4 right, 1 of 2 pictures whole: 75 + 50. code_reasoning: 1 of 2, no picture whole: 50 + 0.
    result = score("mme", tmp_path, ["Yes", "No", "yes", "Yes", "No", "no"])
    assert result.value == pytest.approx(125.0)
    assert result.details["cognition"] == pytest.approx(50.0)
    assert result.details["subtasks"] == {"existence": pytest.approx(125.0), "code_reasoning": pytest.approx(50.0)}
    assert result.count == 6
    assert not result.notes


def test_mme_counts_an_answer_in_neither_word_as_wrong(tmp_path):
    miniatures.mme(tmp_path)
    assert score("mme", tmp_path, ["maybe", "perhaps"] * 3).value == 0.0


def test_mme_half_asked_picture_is_not_whole(tmp_path):
    miniatures.mme(tmp_path)
    result = score("mme", tmp_path, ["Yes"], limit=1)
    assert (result.value, result.notes) == (100.0, ["subset: 1 of 6 questions"])


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


def test_quickstart_stands_beside_its_baseline(tmp_path):
    miniatures.quickstart(tmp_path)
    result = score("quickstart", tmp_path, ["yes", "yes", "Red."])
    assert result.value == pytest.approx(200 / 3)
    assert result.details["trained"]["types"]["color"]["accuracy"] == 100.0
    # The baseline has one training question: it answers red to everything, which is right once.
    assert result.details["question-only baseline"]["accuracy"] == pytest.approx(100 / 3)
    assert result.notes == ["a model that never sees the picture: 33.3"]


def test_a_subset_is_labelled(tmp_path):
    miniatures.gqa(tmp_path)
    assert score("gqa", tmp_path, ["yes"], limit=1).notes == ["subset: 1 of 3 questions"]


@pytest.mark.parametrize("name", ["gqa", "textvqa", "mme", "scienceqa", "seed"])
def test_truths_of_another_release_are_an_error(tmp_path, name):
    folder = getattr(miniatures, {"scienceqa": "science_qa"}.get(name, name))(tmp_path)
    path = folder / get_task(name).questions
    path.write_text(
        path.read_text().replace('"a1"', '"zz"').replace("What is written?", "What?").replace("Is it", "Was it")
    )
    path.write_text(
        path.read_text().replace('"id": "1"', '"id": "99"').replace('"question_id": 1', '"question_id": 99')
    )
    number = len(get_task(name).read(tmp_path))
    with pytest.raises(DataError, match=r"match|releases"):
        score(name, tmp_path, ["x"] * number)


def test_missing_data_says_what_and_where_from(tmp_path):
    (tmp_path / "pope" / "coco").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        get_task("pope").read(tmp_path)
    message = str(error.value)
    assert "POPE: 5 of 5 are missing" in message
    assert f"{tmp_path}/pope/val2014   <- missing" in message
    assert "github.com/AoiDragon/POPE" in message
    miniatures.pope(tmp_path)
    assert len(get_task("pope").read(tmp_path)) == 6


@pytest.mark.parametrize("name", list(TASKS))
def test_each_missing_file_is_named_with_its_origin(tmp_path, name):
    task = get_task(name)
    folder = tmp_path / task.folder
    wanted = [part for part in (task.questions, task.images, *task.pictures, *task.needs) if part not in ("", ".")]
    for part in wanted:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).touch()
    task.check_data(tmp_path)
    for part in wanted:
        (folder / part).rename(tmp_path / "elsewhere")
        with pytest.raises(DataError) as error:
            task.check_data(tmp_path)
        assert f"{task.title}: 1 of" in str(error.value)
        assert f"  {folder / part}   <- missing\n" in str(error.value)
        assert str(error.value).endswith(task.origin)
        (tmp_path / "elsewhere").rename(folder / part)


def test_unknown_benchmark_names_the_nearest():
    with pytest.raises(ConfigError, match="mmbench"):
        get_task("mmbensh")


def test_rotating_options_is_refused_where_there_are_none(tmp_path):
    miniatures.gqa(tmp_path)
    with pytest.raises(ConfigError, match="circular"):
        get_task("gqa").read(tmp_path, circular=True)


def test_bootstrap_equals_the_binomial_error_and_follows_the_unit():
    right = [1.0] * 60 + [0.0] * 40
    pairs = [(value, 1.0) for value in right]

    def error(units):
        sums_UK = sum_by_unit(units, pairs)
        return Score(metric="", sums_UK=sums_UK, headline=mean_percent, count=100).standard_error(2000)

    independent = error(range(100))
    assert independent == pytest.approx(100.0 * np.sqrt(0.6 * 0.4 / 100), rel=0.06)  # 4.90; noise of 2000 draws: 2 %
    # Ten questions of a picture that stand or fall together carry a tenth of the information: sqrt(10) more error.
    assert error([number // 10 for number in range(100)]) == pytest.approx(independent * np.sqrt(10), rel=0.06)
    assert error([0] * 100) == 0.0
    assert error(range(100)) == independent  # the seed is fixed
