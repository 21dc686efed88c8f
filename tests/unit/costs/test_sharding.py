"""Sizes on one rank."""

from dataclasses import replace

from megatron_moellava.costs.sharding import routed_tokens
from tests.helpers.planning import layout_of


def test_the_vocabulary_is_padded_to_be_shared():
    assert layout_of(1).vocabulary == layout_of(1).backbone.vocab_size
    shared = layout_of(8, parallel__tensor_model_parallel_size=8)
    assert shared.vocabulary % 8 == 0 and 0 <= shared.vocabulary - shared.backbone.vocab_size < 8


def test_a_row_holds_as_many_images_as_fit_with_a_short_text():
    layout = layout_of(1, data__seq_length=2048, training__micro_batch_size=3)
    assert layout.tokens == 3 * 2048 and layout.images == 3 * (2048 // (576 + 16))
    padded = replace(layout, run=replace(layout.run, data=replace(layout.run.data, packing=False)))
    assert padded.images == 3


def test_a_row_of_pooled_videos_holds_many_frames():
    """Eight frames of 576 tokens pooled 2 x 2 x 2 are 576 tokens, so a row holds as many videos as pictures."""
    pooled = {"data__seq_length": 2048, "data__video_pooling": "2x2x2"}
    layout = layout_of(1, **pooled)
    assert layout.fullest_sample == (8, 4 * 144) and layout.images == 8 * (2048 // (576 + 16))
    assert layout_of(1, **pooled, data__packing=False).images == 8
    assert layout_of(1, **pooled, data__video_frames=100).fullest_sample == (28, 14 * 144), "the row cuts the video"
    assert layout_of(1, **pooled, data__video_frames=7).fullest_sample == (7, 4 * 144)


def test_sequence_parallelism_shares_the_positions():
    two = {"parallel__tensor_model_parallel_size": 2}
    assert layout_of(2, **two).sp == 2 and layout_of(2, **two, parallel__sequence_parallel=False).sp == 1


def test_experts_of_a_rank_get_every_choice_of_its_tokens_once():
    layout = layout_of(2)
    assert routed_tokens(layout) == layout.tokens * layout.moe.moe_router_topk
    assert routed_tokens(layout, imbalance=1.5) == 1.5 * routed_tokens(layout)
    split = layout_of(2, parallel__tensor_model_parallel_size=2, parallel__expert_tensor_parallel_size=2)
    assert routed_tokens(split) == routed_tokens(layout), "each of the group sees the tokens of all"


def test_roles_follow_the_stage_unless_they_are_named():
    layout = layout_of(1)
    assert "experts" in layout.trains
    assert list(layout_of(1, training__trains=["projector"]).trains) == ["projector"]
    assert layout.activation_bytes == 2 and layout.model.moe == layout.moe
