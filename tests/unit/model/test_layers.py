"""Layer specs: which layers are MoE, which quirks of a backbone they carry."""

import pytest
import torch

from megatron_moellava.config import MoEConfig
from megatron_moellava.model.build import build_model
from megatron_moellava.model.layers import ParallelResidualLayer
from tests.helpers.inference_models import GATES, tiny_run

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.transformer.moe.moe_layer import MoELayer


@pytest.mark.parametrize(
    ("placement", "expected"),
    [("sparse", [0, 2]), ("dense", [0, 1, 2, 3]), ("first_half", [0, 1]), ("second_half", [2, 3]), ((1,), [1])],
)
def test_moe_layers_stand_where_the_placement_says(world, placement, expected):
    (model,) = build_model(tiny_run(MoEConfig(placement=placement)))
    layers = model.language_model.decoder.layers
    assert [number for number, layer in enumerate(layers) if isinstance(layer.mlp, MoELayer)] == expected
    assert len(layers) == 4


def test_checkpoints_do_not_depend_on_how_experts_compute(world):
    shapes = []
    for kind in ("megatron", "sequential experts"):
        state = build_model(tiny_run(GATES[kind]))[0].sharded_state_dict(metadata={"non_homogeneous_layers": True})
        tensors = [value for value in nested_values(state) if isinstance(value, ShardedBase) and "experts" in value.key]
        assert tensors
        shapes.append({value.key for value in tensors if "_extra_state" not in value.key})
    assert shapes[0] == shapes[1]


def test_a_shared_expert_stands_beside_the_experts_only_where_it_is_asked_for(world):
    for kind in ("megatron", "shared experts"):
        (model,) = build_model(tiny_run(GATES[kind]))
        mlp = model.language_model.decoder.layers[0].mlp
        assert (mlp.shared_experts is not None) == (kind == "shared experts")


@torch.no_grad()
def test_phi_adds_attention_and_mlp_of_one_norm(world):
    (model,) = build_model(tiny_run(None, "phi-2-tiny"))
    layer = model.eval().language_model.decoder.layers[0]
    assert isinstance(layer, ParallelResidualLayer)
    hidden_SBH = torch.randn(3, 1, layer.config.hidden_size)
    normed_SBH = layer.input_layernorm(hidden_SBH)
    rotary = model.language_model.rotary_pos_emb(3)
    attended, attended_bias = layer.self_attention(normed_SBH, attention_mask=None, rotary_pos_emb=rotary)
    fed, fed_bias = layer.mlp(normed_SBH)
    expected = hidden_SBH + attended + attended_bias + fed + fed_bias
    assert torch.allclose(layer(hidden_SBH, rotary_pos_emb=rotary)[0], expected, atol=1e-5)


@torch.no_grad()
def test_minicpm_scales_each_branch_before_it_joins(world):
    """With a branch scaled by 0 a layer would be the identity; the multiplier of the family is applied to both branches."""
    (model,) = build_model(tiny_run(None, "minicpm-tiny"))
    layer, multiplier = model.eval().language_model.decoder.layers[0], model.backbone.residual_multiplier
    assert 0 < multiplier < 1
    add = layer.self_attn_bda(False, False)
    branch, residual = torch.randn(2, 1, 4), torch.randn(2, 1, 4)
    assert torch.allclose(add((branch, None), residual, 0.0), residual + branch * multiplier)
    bias = torch.ones(4)
    assert torch.allclose(add((branch, bias), residual, 0.0), residual + (branch + bias) * multiplier)


def test_qwen3_norms_queries_and_keys_and_llama_does_not(world):
    qwen3, llama = (build_model(tiny_run(None, name))[0] for name in ("qwen3-tiny", "llama-tiny"))
    attention = qwen3.language_model.decoder.layers[0].self_attention
    assert attention.q_layernorm.weight.shape == (qwen3.backbone.kv_channels,)
    assert llama.language_model.decoder.layers[0].self_attention.q_layernorm is None
