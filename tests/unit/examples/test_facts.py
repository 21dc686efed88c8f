"""Facts without pictures: what is written, what is held out, and the checkpoint that the grids about knowledge start from."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.costs.shapes import model_from_json
from tests.helpers.paths import REPO

THINGS, VIEWS = 6, 3


@pytest.fixture(autouse=True)
def ablations_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples/ablations"))


@pytest.fixture
def data(tmp_path):
    from facts import write_facts

    write_facts(tmp_path / "data", things=THINGS, views=VIEWS)
    return tmp_path / "data"


def pixels(data, name):
    return np.asarray(Image.open(data / "images" / name), dtype=float)


def test_every_thing_is_asked_for_from_a_view_that_no_row_has(data):
    rows = json.loads((data / "facts.json").read_text())
    tests = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert len(rows) == THINGS * VIEWS and len(tests) == THINGS
    assert not {row["image"] for row in rows} & {test["image"] for test in tests}
    answers = {row["image"].rsplit("-", 1)[0]: row["conversations"][1]["value"] for row in rows}
    assert all(test["answer"] == answers[test["question_id"]] and test["facts"] == 8 for test in tests)
    assert json.loads((data / "counts.json").read_text())["facts"] == THINGS * 8


def test_a_view_is_the_thing_with_noise_and_far_from_every_other_thing(data):
    codes = [json.loads(line)["question_id"] for line in (data / "test.jsonl").read_text().splitlines()]
    for code in codes:
        held_out = pixels(data, f"{code}-{VIEWS}.png")
        assert (held_out != pixels(data, f"{code}-0.png")).any()
        distances = {other: np.abs(held_out - pixels(data, f"{other}-0.png")).mean() for other in codes}
        assert min(distances, key=distances.__getitem__) == code
        assert sorted(distances.values())[1] > 2 * distances[code]


def test_the_same_data_come_out_the_same(data, tmp_path):
    from facts import write_facts

    write_facts(tmp_path / "again", things=THINGS, views=VIEWS)
    for path in data.rglob("*.*"):
        if path.name == "tokenizer.model":  # names the folder that it was made in; its pieces are in tokenizer.vocab
            continue
        again = tmp_path / "again" / path.relative_to(data)
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest(), path


def test_the_start_has_the_sizes_asked_for(data, tmp_path):
    from facts import VOCABULARY, write_start

    write_start(tmp_path, data, layers=1, hidden=32, ffn=48, seed=1)
    model = model_from_json(read_description(require_checkpoint(tmp_path / "start")).model)
    backbone, tower = model.backbone, model.tower
    assert (backbone.num_layers, backbone.hidden_size, backbone.ffn_hidden_size) == (1, 32, 48)
    assert backbone.vocab_size == VOCABULARY and tower.num_features == 1


def test_pictures_come_with_their_licence_and_no_view_twice(tmp_path):
    from facts import write_facts

    write_facts(tmp_path, things=2, views=VIEWS, pictures=True)
    rows = json.loads((tmp_path / "facts.json").read_text())
    asked = [json.loads(line)["image"] for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    images = [*{row["image"] for row in rows}, *asked]
    assert len(images) == len({(tmp_path / "images" / name).read_bytes() for name in images}) == 2 * (VIEWS + 1)
    assert {Image.open(tmp_path / "images" / name).size for name in images} == {(72, 72)}
    assert "CC-BY-SA-4.0" in (tmp_path / "images/names/ATTRIBUTION.md").read_text()
    assert len(json.loads((tmp_path / "captions.json").read_text())) == 2 * VIEWS
