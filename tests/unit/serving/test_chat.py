"""What chat saves, training reads."""

import json

import pytest

from megatron_moellava.data.sample import Turn
from megatron_moellava.serving.chat import Conversation
from tests.helpers.data_files import config, make_loader, write_images

PLACES = {"beside": "a.png", "below": "pictures/a.png", "elsewhere": "../elsewhere/a.png"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_saved_conversation_is_a_row_that_training_reads(tmp_path, monkeypatch, place, absolute):
    folder = tmp_path / "saved"
    folder.mkdir()
    monkeypatch.chdir(folder)
    picture = (folder / PLACES[place]).resolve()
    write_images(picture.parent, (picture.name,))
    conversation = Conversation(engine=None, sampling=None)
    conversation.show(str(picture) if absolute else PLACES[place])
    conversation.names = [name for name, _ in conversation.pending]
    conversation.turns = [Turn(role="user", text="<image>\nWhat?"), Turn(role="assistant", text="A lake, no <image>.")]
    monkeypatch.chdir(tmp_path)
    conversation.save(str(folder / "chat.json"))
    batch = next(make_loader(config(folder / "chat.json", packing=False), micro_batch_size=1))
    assert len(batch.pixel_values_NCHW) == 1 and batch.sample_ids == ["chat"]


def test_a_conversation_without_pictures_may_speak_of_the_tag(tmp_path):
    turns = [Turn(role="user", text="What is < image >?"), Turn(role="assistant", text="A tag.")]
    Conversation(engine=None, sampling=None, turns=turns).save(str(tmp_path / "chat.json"))
    (record,) = json.loads((tmp_path / "chat.json").read_text())
    assert record == {
        "id": "chat",
        "conversations": [{"from": "human", "value": "What is < image >?"}, {"from": "gpt", "value": "A tag."}],
    }


def test_a_quoted_name_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path, ("a.png",))
    conversation = Conversation(engine=None, sampling=None)
    conversation.show('"~/a.png"')
    assert len(conversation.pending) == 1
