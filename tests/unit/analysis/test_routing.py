"""What is read of a data set and of the routers."""

import torch

from megatron_moellava.analysis.routing import as_conversation, first_choices


def test_dropped_choices_are_no_experts():
    weights_TE = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert first_choices(weights_TE, 2).tolist() == [[2, 0], [1, -1]]


def test_closed_questions_become_conversations():
    row = {"question_id": 3, "image": "a.png", "question": "which?", "answer": "red", "type": "color"}
    record = as_conversation(row)
    assert record["conversations"][0]["value"] == "<image>\nwhich?"
    assert (record["tag"], record["image"]) == ("color", "a.png")
    assert "image" not in as_conversation({"question": "is it?", "answer": "yes"})
