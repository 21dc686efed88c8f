"""POPE and MME on miniatures of their published layout, against scores counted by hand."""

import pytest

from megatron_moellava.config import DataError
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


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
