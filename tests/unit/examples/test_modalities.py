"""The data set of examples/modalities: its truth is that of the files, and training reads what it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.config import DataConfig, from_dict, read_yaml
from megatron_moellava.data.first_rows import first_rows_problem
from megatron_moellava.data.quantities import open_picture
from megatron_moellava.data.sample import parse_record
from megatron_moellava.validation.modalities import modality_problems
from tests.helpers.paths import REPO

HERE = REPO / "examples/modalities"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("modalities")
    (out / "real").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out / f"real/{number}.jpg")
    command = [sys.executable, str(HERE / "make_data.py"), "--pictures", str(out / "real"), "--out", str(out)]
    subprocess.run([*command, "--train", "16", "--test", "5"], check=True)
    return out


@pytest.fixture(scope="module")
def data(made) -> DataConfig:
    source = {"path": str(made / "train.json"), "image_folder": str(made / "images")}
    return from_dict(DataConfig, {**read_yaml(str(HERE / "modalities.yaml"))["data"], "sources": [source]})


def test_training_reads_every_row_by_the_records_of_the_yaml(made, data):
    assert not [*modality_problems(data)] and first_rows_problem(data.sources[0], data) is None
    rows = json.loads((made / "train.json").read_text())
    kinds = set()
    for row in rows:
        sample = parse_record(row, origin="row", modalities=data.modalities)
        shown = tuple(ref.modality.name if ref.modality else "image" for ref in sample.images)
        assert len(sample.turns) == 2 * len(row["tag"].split("+")) and shown == tuple(
            key.strip("<>") for key in row["conversations"][0]["value"].split("\n")[:-1]
        )
        kinds.add(frozenset(shown))
    assert len(rows) == 16 and len(kinds) > 2


def test_answers_are_those_of_the_files(made, data):
    depth, thermal = data.modalities
    for line in (made / "test.jsonl").read_text().splitlines():
        asked = json.loads(line)
        kind, answer = asked["type"], asked["answer"]
        if kind in ("nearer", "distance"):
            metres = np.asarray(Image.open(made / "images" / asked["depth"])) / 1000
            left, right = (np.median(part[part > 0]) for part in (metres[20:52, 8:40], metres[20:52, 56:88]))
            place = left if "left one" in asked["text"] else right
            assert answer == (("left" if left < right else "right") if kind == "nearer" else f"{place:.0f} m")
            shown = np.asarray(open_picture(str(made / "images" / asked["depth"]), depth, "x")[0])[..., 0]
            near, far = (np.median(part[part > 0]) for part in (shown[20:52, 8:40], shown[20:52, 56:88]))
            assert (near > far) == (left < right), "near is bright"
        if kind in ("warmer", "hot"):
            degrees = np.asarray(Image.open(made / "images" / asked["thermal"])) * thermal.scale + thermal.offset
            left, right = degrees[20:52, 8:40].mean(), degrees[20:52, 56:88].mean()
            place = left if "left one" in asked["text"] else right
            assert answer == (
                ("left" if left > right else "right") if kind == "warmer" else "yes" if place > 60 else "no"
            )


def test_answers_are_scored_by_type(made):
    rows = [json.loads(line) for line in (made / "test.jsonl").read_text().splitlines()]
    said = [{"question_id": row["question_id"], "text": f" {row['answer'].upper()}."} for row in rows]
    said[0]["text"] = "no idea"
    (made / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    command = [sys.executable, str(HERE / "score.py"), str(made / "test.jsonl"), str(made / "said.jsonl")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[0].split() == ["nearer", "80.0%", "of", "5"] and all("100.0% of 5" in line for line in lines[1:])
