"""What chat and serve make of their words before a model is loaded."""

from argparse import Namespace

import pytest

from megatron_moellava import parallel
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.serving import command
from tests.helpers.inference_models import TOKENIZER, ask, tiny_checkpoint


def test_a_checkpoint_that_is_not_there_says_how_to_get_one():
    with pytest.raises(CheckpointError, match="--load=/nowhere does not exist; name a checkpoint folder, or run"):
        command.open_engine(Namespace(load="/nowhere"))


def test_packages_that_serving_needs_are_named(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ConfigError, match=r"serving needs uvicorn: pip install 'megatron-moellava\[demo\]'"):
        command.serve(Namespace(load="/nowhere"))


def test_examples_are_the_pictures_of_a_folder(tmp_path):
    assert command._examples("") == ()
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in command._examples(str(tmp_path))] == ["a.JPG", "b.png"]
    with pytest.raises(ConfigError, match="is not a folder"):
        command._examples(str(tmp_path / "b.png"))


def test_the_terminal_gets_the_events_of_its_own_request(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    words = Namespace(
        load=str(folder),
        tokenizer=str(TOKENIZER),
        template="",
        precision="",
        overrides=[],
        no_verify=False,
        max_length=None,
        memory_limit=None,
    )
    engine = command.MultiRankEngine(command.open_engine(words, max_batch_size=1))
    events = list(engine.stream(ask(0)))
    assert events[-1].completion is not None and not engine.engine.busy
    assert "".join(event.delta for event in events) == events[-1].completion.text
    next(iter(engine.stream(ask(1))))
    engine.cancel("r1")
    assert not engine.engine.busy
    engine.stop()
    parallel.shutdown()
