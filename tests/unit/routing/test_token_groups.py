"""Which tokens are counted together: modalities, and the question types of a sample's turns."""

import torch

from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.routing.token_groups import question_types, token_groups, token_modalities, turn_numbers
from tests.helpers.batches import X, padded


def test_a_turn_ends_with_its_answer_and_the_rest_belongs_to_the_last():
    assert turn_numbers(torch.tensor([X, 7, 8, X, 9, X])).tolist() == [0, 0, 0, 1, 1, 1]
    assert turn_numbers(torch.tensor([X, X])).tolist() == [0, 0]


def test_tokens_of_each_turn_get_its_type():
    batch = padded([[4, 5, 6, 7, 8, 9]], [[X, 7, X, X, 9, X]], ["color+shape"])
    names, types_BS = question_types(batch)
    assert [names[i] for i in types_BS[0].tolist()] == ["color"] * 2 + ["shape"] * 4


def test_a_tag_that_does_not_name_the_turns_is_one_type():
    names, types_BS = question_types(padded([[4, 5, 6, 7]], [[X, 7, X, X]], ["a+b"]))
    assert names == ["a+b"]
    assert types_BS.tolist() == [[0] * 4]


def test_packed_samples_have_their_own_tags_and_the_tail_has_none():
    ends = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    batch = padded([[4, 5, 6, 7, 0, 0]], [[5, X, 7, X, X, X]], ["color", ""], cu_seqlens=ends)
    names, types_BS = question_types(batch)
    assert (names, types_BS.tolist()) == (["color"], [[0, 0, -1, -1, -1, -1]])


def test_padding_and_images_are_not_text():
    names, members_GBS = token_groups(padded([[IMAGE_TOKEN, 5, 6, 0]], [[X, 6, X, X]], ["color"]))
    assert names == ["text", "image", "type:color"]
    assert members_GBS[:, 0].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]]


def test_visual_tokens_are_told_apart_by_their_picture():
    batch = padded([[IMAGE_TOKEN, 5, IMAGE_TOKEN, IMAGE_TOKEN], [6, IMAGE_TOKEN, 7, 0]], [[X] * 4] * 2, ["", "color"])
    batch.pictures = (("image", 1), ("depth", 2), ("image", 1))
    modalities = ("text", "image", "depth", "thermal")
    assert token_modalities(batch, modalities).tolist() == [[1, 0, 2, 2], [0, 1, 0, 0]]
    names, members_GBS = token_groups(batch, modalities)
    assert names == [*modalities, "type:color"]
    assert members_GBS[:4].sum(dim=(1, 2)).tolist() == [3, 2, 2, 0], "each real token is in one of them"
