"""A benchmark's questions with their answers."""

from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


def test_a_subset_is_labelled(tmp_path):
    miniatures.gqa(tmp_path)
    assert score("gqa", tmp_path, ["yes"], limit=1).notes == ["subset: 1 of 3 questions"]
