"""What is read of a data set and of the routers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from megatron_moellava.analysis.routing import _pictures, _question, as_conversation, first_choices
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.data.loader import build_encoder
from megatron_moellava.data.templates import get_template
from megatron_moellava.data.tokenizer import load_tokenizer
from megatron_moellava.inference.prompts import Prompter
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import conversation
from tests.helpers.inference_models import TOKENIZER, tiny_run
from tests.helpers.videos import still


def test_dropped_choices_are_no_experts():
    weights_TE = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert first_choices(weights_TE, 2).tolist() == [[2, 0], [1, -1]]


def test_closed_questions_become_conversations():
    row = {"question_id": 3, "image": "a.png", "question": "which?", "answer": "red", "type": "color"}
    record = as_conversation(row)
    assert record["conversations"][0]["value"] == "<image>\nwhich?"
    assert (record["tag"], record["image"]) == ("color", "a.png")
    assert "image" not in as_conversation({"question": "is it?", "answer": "yes"})


def test_a_video_is_the_frames_that_the_model_was_trained_with(tmp_path):
    """Three frames, 2 x 2 tokens of each pooled: the overlay shows those of the first."""
    (tmp_path / "v").mkdir()
    for number in range(6):
        still(number).save(tmp_path / f"v/{number}.png")
    data = replace(tiny_run().data, video_frames=3, video_pooling="2x2")
    tower = get_tower("clip-tiny")
    prompter = Prompter(template=get_template("v1"), tokenizer=load_tokenizer(TOKENIZER), tower=tower, data=data)
    record = {"id": "v", "video": "v", "conversations": conversation("<video>\nWhat?", "grey")}
    encoder = build_encoder(data, prompter.tokenizer, tower, "v1")
    question = _question(record, str(tmp_path), "row 1", encoder, prompter)
    assert len(question.pixels) == 3
    is_image_T = question.encoded.tokens_S == IMAGE_TOKEN
    side = tower.feature_side // 2
    assert is_image_T.sum() == 3 * side**2
    first_RL = np.flatnonzero(is_image_T)[:, None]
    (picture,) = _pictures(question, SimpleNamespace(tower=tower), first_RL)
    assert picture.first_LF.tolist() == [np.flatnonzero(is_image_T)[: side**2].tolist()]
