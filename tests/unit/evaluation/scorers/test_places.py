"""Boxes and points against hand-counted truths."""

import numpy as np
import pytest

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.scorers.places import Compared, iou, matches, mean_average_precision
from tests.helpers import evaluation_miniatures as miniatures
from tests.helpers.evaluation_miniatures import score


def box(left, top, right, bottom):
    return np.array([[left, top], [right, bottom]], dtype=float)


def test_overlaps():
    assert iou(box(0, 0, 2, 1), box(1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert iou(box(0, 0, 2, 2), box(0, 0, 2, 2)) == 1
    assert iou(box(0, 0, 1, 1), box(2, 2, 3, 3)) == 0 == iou(box(0, 0, 0, 0), box(0, 0, 0, 0))


def test_each_truth_is_hit_once():
    truths = [box(0, 0, 10, 10), box(20, 0, 30, 10)]
    assert matches([box(0, 0, 10, 9), box(0, 0, 10, 10), box(20, 0, 30, 10)], truths, 0.5) == [True, False, True]
    assert matches([box(0, 0, 1, 1)], [], 0.5) == [False] and matches([], truths, 0.5) == []


def test_average_precision_ranks_by_place_in_the_answer():
    """Of cats, the first boxes hit and miss, the second hits: precisions 1/2 at the first hit's rank and 2/3; two truths."""
    here, away = box(0, 0, 10, 10), box(50, 50, 60, 60)
    one = Compared(truths=[here], boxes=[away, here], points=[], name="cat", image="a")
    two = Compared(truths=[here], boxes=[here], points=[], name="cat", image="b")
    # Ranked: [miss of a, hit of b] at place 0, [hit of a] at place 1.
    assert mean_average_precision([one, two], 0.5) == pytest.approx((2 / 3 + 2 / 3) / 2)
    cup = Compared(truths=[here], boxes=[], points=[], name="cup", image="a")
    assert mean_average_precision([one, two, cup], 0.5) == pytest.approx((2 / 3 + 0) / 2)


def test_referring_counts_the_first_box(tmp_path):
    miniatures.boxes(tmp_path)
    for text, right in (("[0, 0, 500, 500]", 100), ("[600, 600, 700, 700] or [0, 0, 500, 500]", 0), ("there", 0)):
        found = score("boxes", tmp_path, [text])
        assert found.value == right, text
    assert score("boxes", tmp_path, ["[0, 0, 500, 250]"]).details["mean IoU"] == pytest.approx(50, abs=0.2)


def test_pointing_takes_a_point_or_the_middle_of_a_box(tmp_path):
    miniatures.boxes(tmp_path)
    for text, right in (("[250, 250]", 100), ("[900, 250]", 0), ("[0, 0, 400, 400]", 100), ("left", 0)):
        assert score("pointing", tmp_path, [text]).value == right, text


def test_detection_counts_hits_among_boxes_and_truths(tmp_path):
    miniatures.coco_boxes(tmp_path)  # 40 x 30 on a square of 40: 5 pixels down
    cats = "[0, 125, 250, 375] [500, 125, 750, 375] [0, 0, 99, 99]"
    found = score("coco_boxes", tmp_path, [cats, "none"])
    assert found.value == pytest.approx(100 * 4 / (5 + 1))
    assert found.details["AP50, by order"] == 50 and found.details["true boxes"] == 3


def test_without_the_picture_its_size_must_be_known(tmp_path):
    folder = miniatures.coco_boxes(tmp_path)
    (folder / "val2017/a.jpg").unlink()
    assert score("coco_boxes", tmp_path, ["[0, 125, 250, 375]", "none"]).value > 0
    miniatures.boxes(tmp_path)
    (tmp_path / "images/a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png is missing: .*width and height"):
        score("boxes", tmp_path, ["[0, 0, 1, 1]"])
