"""Short free text on miniatures of TextVQA and GQA, against scores counted by hand."""

import pytest

from megatron_moellava.evaluation.scorers.text import soft_accuracies
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


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
