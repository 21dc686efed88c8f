"""The data set of examples/boxes: its boxes are those of the pixels; training and evaluation read what it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.data.sample import parse_record
from megatron_moellava.evaluation.tasks import get_task
from tests.helpers.paths import REPO


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("boxes")
    script = REPO / "examples/boxes/make_data.py"
    subprocess.run([sys.executable, str(script), "--out", str(out), "--train", "12", "--test", "6"], check=True)
    return out


def test_a_box_holds_the_pixels_of_its_shape_and_no_more(made):
    for question in get_task("boxes").read(made):
        picture = np.asarray(Image.open(question.paths[0])).astype(int)
        ((left, top, right, bottom),) = question.fields["boxes"]
        inside = picture[top:bottom, left:right]
        color = inside[inside.shape[0] * 2 // 3, inside.shape[1] // 2]
        rows, columns = np.nonzero((inside == color).all(axis=-1))
        assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (0, right - left, 0, bottom - top)


def test_every_turn_has_its_box_and_no_picture_is_in_both_splits(made):
    rows = json.loads((made / "boxes.json").read_text())
    assert len(rows) == 12
    assert all(len(parse_record(row, origin="row").regions) * 2 == len(row["conversations"]) for row in rows)
    contents = [path.read_bytes() for path in made.glob("images/*/*.png")]
    assert len({*contents}) == len(contents) == 18
