"""The command from rows to rows of preferences, on a tiny random model."""

import json

import pytest

from megatron_moellava.commands.make_preferences import main
from megatron_moellava.data.pair_rows import parse_pair
from tests.helpers import data_files
from tests.helpers.inference_models import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    tiny_checkpoint(folder / "run")
    data_files.make_set(folder / "data", 3)
    return folder


def made(folder, name: str, *options: str) -> tuple[int, list[dict]]:
    save = folder / name
    base = ["--load", str(folder / "run"), "--data", str(folder / "data" / "rows.json"), "--save", str(save)]
    code = main([*base, "--samples", "2", "--max-new-tokens", "4", "--max-length", "400", *options])
    return code, [json.loads(line) for line in save.open()] if save.exists() else []


def test_the_answers_of_a_model_become_pairs_the_same_ones_every_time(folder, capsys):
    code, pairs = made(folder, "pairs.jsonl", "--with-truth")
    assert code == 0 and len(pairs) == 3 and "3 pairs of 3 questions" in capsys.readouterr().out
    for number, pair in enumerate(pairs):
        chosen, rejected = parse_pair(pair, origin="x")
        assert chosen.turns[-1].text == f"answer {number}" and rejected.turns[-1].text
        assert chosen.turns[:-1] == rejected.turns[:-1]
    assert made(folder, "again.jsonl", "--with-truth", "--batch-size", "1") == (0, pairs)
    assert made(folder, "other.jsonl", "--with-truth", "--seed", "5")[1] != pairs


def test_a_model_that_is_never_right_gives_no_pairs_and_says_so(folder, capsys):
    assert made(folder, "none.jsonl") == (2, [])
    assert "none of the 3 questions" in capsys.readouterr().err


def test_answers_that_a_poll_cannot_read_are_counted(folder, capsys):
    record = {"id": "x", "image": "a.png"}
    record |= {
        "conversations": data_files.conversation("<image>\nis there a red shape?", "no", "is there a circle?", "yes")
    }
    (folder / "data" / "polls.json").write_text(json.dumps([record]))
    options = ["--data", str(folder / "data" / "polls.json"), "--scorer", "poll", "--with-truth"]
    assert made(folder, "polls.jsonl", *options) == (2, [])
    assert "4 of 4 answers are neither yes nor no and in no pair" in capsys.readouterr().err


def test_pictures_that_are_not_there_are_said_before_the_model_is_loaded(folder, capsys):
    assert made(folder, "lost.jsonl", "--image-folder", str(folder)) == (2, [])
    assert "picture a.png is not in" in capsys.readouterr().err
