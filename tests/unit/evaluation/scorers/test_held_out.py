"""The quickstart's held-out questions beside the baseline that never sees a picture."""

import pytest

from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


def test_quickstart_stands_beside_its_baseline(tmp_path):
    miniatures.quickstart(tmp_path)
    result = score("quickstart", tmp_path, ["yes", "yes", "Red."])
    assert result.value == pytest.approx(200 / 3)
    assert result.details["trained"]["types"]["color"]["accuracy"] == 100.0
    # The baseline has one training question: it answers red to everything, which is right once.
    assert result.details["question-only baseline"]["accuracy"] == pytest.approx(100 / 3)
    assert result.notes == ["a model that never sees the picture: 33.3"]
