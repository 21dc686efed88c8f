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


# --- the measured result ------------------------------------------------------------------------------------------------

DETAILS = {
    "IoU@0.25": 80.0,
    "IoU@0.5": 61.5,
    "IoU@0.75": 20.0,
    "mean IoU": 55.0,
    "pointing": 90.0,
    "answers with a box": 99.0,
}
SCORES = {  # what is kept of the records of `moellava evaluate`
    "eval": {"value": 61.5, "standard_error": 2.25, "count": 800, "details": DETAILS},
    "blank": {"value": 3.0, "standard_error": 0.5, "count": 800, "details": DETAILS | {"IoU@0.5": 3.0}},
}


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples/boxes"))
    import measure

    return measure


def test_the_page_is_made_of_what_the_tutorial_leaves(measure, tmp_path):
    for folder, record in SCORES.items():
        file = tmp_path / folder / "boxes" / "scores.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(record | {"benchmark": "boxes"}))
    (tmp_path / "stage2").mkdir()
    steps = [{"iteration": n, "samples": 3, "loss": float(n), "step_seconds": 30.0} for n in range(1, 61)]
    (tmp_path / "stage2/steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    data = measure.gather(tmp_path)
    assert data["scores"] == {"pictures": SCORES["eval"], "blank pictures": SCORES["blank"]}
    assert (data["steps"], data["samples"], data["final_loss"], data["training_minutes"]) == (60, 180, 35.5, 30.0)
    page = measure.page(data)
    assert "| pictures | 61.5 ± 2.2 | 80.0 | 20.0 | 55.0 | 90.0 | 99.0 |" in page
    assert "With the picture 61.5 % of the boxes are right, without it 3.0 %" in page and "the 800 shapes" in page


def test_the_page_is_what_the_data_give_and_the_tutorial_says_the_same(measure):
    data = json.loads((measure.DOCS / measure.DATA).read_text())
    assert (measure.DOCS / measure.PAGE).read_text() == measure.page(data)
    seen, unseen = (data["scores"][shown] for shown in measure.ASKED)
    said = f"{seen['value']:.1f} ± {seen['standard_error']:.1f} % of the boxes are right, {unseen['value']:.1f} % with blank"
    assert said in (REPO / "docs/tutorials/boxes.md").read_text()
    error = (seen["standard_error"] ** 2 + unseen["standard_error"] ** 2) ** 0.5
    assert seen["value"] - unseen["value"] > 3 * error
