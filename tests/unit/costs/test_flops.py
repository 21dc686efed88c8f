"""The products of one micro-batch on one rank."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.costs.flops import (
    Attention,
    Product,
    first_stage_work,
    last_stage_work,
    layer_work,
    useful_flops,
)
from megatron_moellava.costs.shapes import layer_tensors
from megatron_moellava.planning.activations import sizes
from tests.helpers.planning import layout_of


def test_a_product_and_its_gradients():
    work = Product(part="x", rows=10, inner=4, columns=3, weight_gradient=True)
    assert work.forward == 2 * 10 * 4 * 3 and work.backward == 2 * work.forward
    assert Product(part="x", rows=10, inner=4, columns=3, input_gradient=False).backward == 0
    assert work.forward_bytes == 2 * (10 * (4 + 3) + 4 * 3)
    assert useful_flops(work) == 3 * work.forward


def test_attention_counts_the_causal_half_and_not_the_scores_made_again():
    work = Attention(rows=8, length=8, width=16)
    assert work.forward == 4 * 8 * 8 * 16 and work.backward == 2.5 * work.forward
    assert useful_flops(work) == 0.5 * 3 * work.forward
    assert useful_flops(Attention(rows=8, length=8, width=16, causal=False, with_backward=False)) == work.forward


def test_a_dense_layer_is_twice_its_weights_for_each_token():
    layout = layout_of(1)
    backbone = layout.backbone
    work = [item for item in layer_work(layout, False, tokens=7, length=7) if isinstance(item, Product)]
    hidden, ffn = backbone.hidden_size, backbone.ffn_hidden_size
    weights = (
        hidden * (hidden + 2 * backbone.num_query_groups * backbone.kv_channels) + hidden * hidden + 2 * hidden * ffn
    )
    assert sum(item.forward for item in work) == 2 * 7 * weights


def test_latents_are_products_of_their_own_and_narrow_values_are_filled_up():
    backbone, tokens = get_backbone("deepseek-v3-tiny"), 7
    layout = replace(layout_of(1), backbone=backbone)
    work = list(layer_work(layout, False, tokens=tokens, length=tokens))
    tensors = layer_tensors(layout.model, is_moe=False)
    weights = sum(tensor.size for tensor in tensors.values() if len(tensor.shape) == 2)
    assert sum(item.forward for item in work if isinstance(item, Product)) == 2 * tokens * weights
    (scores,) = (item for item in work if isinstance(item, Attention))
    query, value = (backbone.num_attention_heads * size for size in (backbone.kv_channels, backbone.value_channels))
    assert scores.forward == 4 * tokens**2 * query
    narrow = Attention(rows=8, length=8, width=16, value_width=8, causal=False)
    assert useful_flops(narrow) == 3 * 2 * 8 * 8 * (16 + 8)
    assert scores.value_width == value


def test_a_token_goes_through_its_chosen_experts():
    layout = layout_of(1)
    by_part: dict[str, float] = {}
    for item in layer_work(layout, True, tokens=5, length=5):
        by_part[item.part] = by_part.get(item.part, 0.0) + item.forward
    ffn = 2 * 2 * 5 * layout.backbone.hidden_size * layout.backbone.ffn_hidden_size
    assert by_part["experts"] == pytest.approx(layout.moe.moe_router_topk * ffn) and "ffn" not in by_part
    assert by_part["router"] == 2 * 5 * layout.backbone.hidden_size * layout.moe.num_moe_experts


def test_narrow_experts_compute_less():
    parts = {}
    for width in (None, layout_of(1).backbone.ffn_hidden_size // 4):
        layout = layout_of(1, moe__moe_ffn_hidden_size=width)
        work = [item for item in layer_work(layout, True, tokens=5, length=5) if item.part == "experts"]
        parts[width] = sum(item.forward for item in work), expert_bytes(layout)
    whole, narrow = parts.values()
    assert whole == tuple(pytest.approx(4 * value) for value in narrow)


def expert_bytes(layout) -> float:
    return sizes(layout)["expert_inner"]


def test_tensor_parallel_ranks_share_the_work():
    whole, half = (
        sum(item.forward for item in layer_work(layout_of(2, parallel__tensor_model_parallel_size=size), False, 64, 64))
        for size in (1, 2)
    )
    assert half == pytest.approx(whole / 2)


def test_a_frozen_tower_has_no_backward_pass_and_the_output_layer_sees_every_position():
    layout = layout_of(1)
    tower = [item for item in first_stage_work(layout, images=2) if item.part == "tower"]
    assert tower and all(item.backward == 0 for item in tower)
    (output,) = last_stage_work(layout, tokens=9)
    assert output.forward == 2 * 9 * layout.backbone.hidden_size * layout.vocabulary
