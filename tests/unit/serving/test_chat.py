"""What chat saves, training reads."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from megatron_moellava.config import DataError
from megatron_moellava.data.sample import Turn
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.serving.chat import Conversation, _obey
from tests.helpers.data_files import TOWER, config, make_loader, write_images
from tests.helpers.inference_models import TOKENIZER, tiny_run
from tests.helpers.modalities import DEPTH, write_pictures
from tests.helpers.videos import write_video

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
    conversation.names = [item.name for item in conversation.pending]
    conversation.images = [image for item in conversation.pending for image in item.images]
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


def talk(**changes) -> Conversation:
    data = replace(tiny_run().data, **changes)
    prompter = Prompter(template=get_template("v1"), tokenizer=load_tokenizer(TOKENIZER), tower=TOWER, data=data)
    return Conversation(engine=SimpleNamespace(prompter=prompter, stream=lambda request: []), sampling=None)


def test_pictures_go_where_the_question_says_or_first(tmp_path):
    write_images(tmp_path)
    for question, text in (
        ("same?", "<image>\n<image>\nsame?"),
        ("is <image> like <image>?", "is <image> like <image>?"),
        ("is <image> one?", "<image>\n<image>\nis < image > one?"),
    ):
        conversation = talk()
        for name in ("a.png", "b.png"):
            conversation.show(str(tmp_path / name))
        conversation.ask(question, print)
        assert conversation.turns[0].text == text and len(conversation.images) == 2


def test_a_video_is_shown_as_frames_and_saved_with_them(tmp_path):
    write_video(tmp_path / "v.mp4")
    conversation = talk()
    conversation.show_video(str(tmp_path / "v.mp4"))
    conversation.ask("what happens?", print)
    assert conversation.turns[0].text == "<image>" * 8 + "\nwhat happens?" and len(conversation.images) == 8
    conversation.turns[1] = Turn(role="assistant", text="it gets lighter")
    conversation.save(str(tmp_path / "chat.json"))
    batch = next(make_loader(config(tmp_path / "chat.json", packing=False), micro_batch_size=1))
    assert len(batch.pixel_values_NCHW) == 8
    assert json.loads((tmp_path / "chat.json").read_text())[0]["frames"] == [8]
    with pytest.raises(DataError, match="no such video"):
        conversation.show_video("nowhere.mp4")


def test_boxes_of_the_last_answer_are_told_in_pixels():
    conversation = talk()
    assert conversation.places() == "The last answer names no place."
    conversation.images = [Image.new("RGB", (999, 999))]
    conversation.turns = [Turn(role="assistant", text="At [1, 2, 30, 40], not [5, 6].")]
    assert conversation.places() == "box in picture 1: (1.0, 2.0) (30.0, 40.0)\npoint in picture 1: (5.0, 6.0)"


@pytest.mark.parametrize(
    "question, text, row",
    [
        ("near?", "<image>\n<image>\nnear?", "<image>\n<depth>\nnear?"),
        ("how far, <depth>, is <image>?", "how far, <image>, is <image>?", "how far, <depth>, is <image>?"),
    ],
)
def test_pictures_of_a_modality_are_shown_by_its_name_and_saved_so(tmp_path, question, text, row):
    write_images(tmp_path)
    write_pictures(tmp_path)
    conversation = talk(modalities=(DEPTH,))
    for line in (f"/image {tmp_path / 'a.png'}", f"/depth {tmp_path / 'depth/0.png'}"):
        _obey(conversation, line)
    conversation.ask(question, print)
    assert conversation.turns[0].text == text
    conversation.turns[1] = Turn(role="assistant", text="3 m, says <depth>")
    conversation.save(str(tmp_path / "chat.json"))
    (record,) = json.loads((tmp_path / "chat.json").read_text())
    assert (record["image"], record["depth"]) == (["a.png"], ["depth/0.png"])
    assert [turn["value"] for turn in record["conversations"]] == [row, "3 m, says < depth >"]
    data = config(tmp_path / "chat.json", packing=False, modalities=(DEPTH,))
    batch = next(make_loader(data, micro_batch_size=1))
    kinds = ["depth", "image"] if question.startswith("how") else ["image", "depth"]
    assert [kind for kind, _ in batch.pictures] == kinds


def test_a_modality_that_the_checkpoint_does_not_know_is_no_command(tmp_path, capsys):
    write_pictures(tmp_path)
    conversation = talk()
    _obey(conversation, f"/depth {tmp_path / 'depth/0.png'}")
    assert not conversation.pending and capsys.readouterr().out.startswith("/image FILE")
