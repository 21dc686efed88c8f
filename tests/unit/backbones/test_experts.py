"""Families with experts of their own: what config.json says of them, and what a run takes over."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import FAMILIES, backbone_from_hf_config, get_backbone
from megatron_moellava.backbones.experts import MIXTURE, hf_experts_of, mixture_of, sums_to_one
from megatron_moellava.backbones.from_config import hf_config_of
from megatron_moellava.config import ConfigError, MoEConfig


def read(name: str, **changes):
    config = {key: value for key, value in (hf_config_of(get_backbone(name)) | changes).items() if value is not None}
    return backbone_from_hf_config(config, FAMILIES, name="folder").moe


@pytest.mark.parametrize(
    ("name", "changes", "means"),
    [
        ("mixtral-tiny", {"num_local_experts": 6}, {"num_moe_experts": 6, "moe_ffn_hidden_size": None}),
        ("mixtral-tiny", {"num_experts_per_tok": 1}, {"normalize_top1": True, "moe_router_pre_softmax": False}),
        ("mixtral-tiny", {"router_aux_loss_coef": 0.5}, {"moe_aux_loss_coeff": 0.5}),
        ("qwen2-moe-tiny", {}, {"moe_router_pre_softmax": True, "normalize_top1": False, "placement": (0, 2, 3)}),
        ("qwen2-moe-tiny", {"norm_topk_prob": True}, {"moe_router_pre_softmax": False, "normalize_top1": False}),
        ("qwen2-moe-tiny", {"num_experts_per_tok": 1}, {"moe_router_pre_softmax": False, "normalize_top1": False}),
        ("qwen2-moe-tiny", {"mlp_only_layers": [], "decoder_sparse_step": 2}, {"placement": (1, 3)}),
        ("qwen2-moe-tiny", {"mlp_only_layers": []}, {"placement": "dense"}),
        ("qwen2-moe-tiny", {"shared_expert_intermediate_size": 0}, {"moe_shared_expert_gate": False}),
        ("qwen3-moe-tiny", {}, {"moe_router_pre_softmax": False, "moe_shared_expert_intermediate_size": None}),
        ("qwen3-moe-tiny", {"num_experts": None}, {"num_moe_experts": 8}),  # transformers 5: num_local_experts
        ("olmoe-tiny", {"norm_topk_prob": None}, {"moe_router_pre_softmax": True}),
        ("deepseek-moe-tiny", {}, {"moe_shared_expert_intermediate_size": 192, "moe_shared_expert_gate": False}),
        ("deepseek-moe-tiny", {"first_k_dense_replace": 2}, {"placement": (2, 3), "moe_router_pre_softmax": True}),
        ("deepseek-moe-tiny", {"n_shared_experts": None}, {"moe_shared_expert_intermediate_size": None}),
        ("deepseek-v2-tiny", {}, {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": None}),
        ("deepseek-v2-tiny", {"n_group": 4, "topk_group": 2}, {"moe_router_num_groups": None}),  # a greedy choice
        ("deepseek-v3-tiny", {}, {"moe_router_num_groups": 4, "moe_router_group_topk": 2}),
        ("dots1-tiny", {}, {"moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5}),
        ("dots1-tiny", {"routed_scaling_factor": 1.0}, {"moe_router_topk_scaling_factor": None}),
        ("dots1-tiny", {"n_group": 1, "topk_group": 1}, {"moe_router_num_groups": None, "moe_router_group_topk": None}),
    ],
)
def test_a_config_says_what_the_router_computes(name, changes, means):
    moe = read(name, **changes)
    assert {field: getattr(moe, field) for field in means} == means


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mixtral-tiny", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1: only 0.0"),
        ("mixtral-tiny", {"num_local_experts": "eight"}, "num_local_experts='eight': must be a number"),
        ("qwen2-moe-tiny", {"use_sliding_window": True}, "use_sliding_window=True: only False"),
        ("qwen2-moe-tiny", {"qkv_bias": False}, "qkv_bias=False: only True"),
        ("qwen2-moe-tiny", {"mlp_only_layers": "all"}, "mlp_only_layers='all': must be a number, or a list"),
        ("olmoe-tiny", {"clip_qkv": 8.0}, "clip_qkv=8.0: only None"),
        ("qwen3-moe-tiny", {"n_group": 4}, "n_group=4: unknown key"),
        ("deepseek-moe-tiny", {"scoring_func": "sigmoid"}, "scoring_func='sigmoid': only 'softmax'"),
        ("deepseek-moe-tiny", {"num_experts_per_tok": None}, "lacks num_experts_per_tok"),
        ("deepseek-v2-tiny", {"topk_method": "group_limited_greedy"}, "judges a group of experts by its best one"),
        ("deepseek-v2-tiny", {"norm_topk_prob": True}, "norm_topk_prob=True: only False"),
        ("deepseek-v3-tiny", {"norm_topk_prob": False}, "norm_topk_prob=False with num_experts_per_tok=4"),
        ("deepseek-v3-tiny", {"rope_interleave": False}, "rope_interleave=False: only True"),
        ("deepseek-v3-tiny", {"topk_method": "greedy"}, "topk_method='greedy': only 'noaux_tc'"),
        ("dots1-tiny", {"norm_topk_prob": False}, "norm_topk_prob=False with num_experts_per_tok=4"),
        ("dots1-tiny", {"topk_group": 3}, "topk_group=3 with num_experts_per_tok=4: a group is judged by its best 2"),
        ("dots1-tiny", {"sliding_window": 64, "max_window_layers": 2}, "sliding_window=64 from layer 2"),
    ],
)
def test_what_no_router_here_computes_is_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(name, **changes)


def test_a_mixture_is_what_unset_fields_stand_for():
    backbone = get_backbone("olmoe-tiny")
    spelt = replace(backbone.moe, placement=(0, 1, 2, 3), moe_ffn_hidden_size=backbone.ffn_hidden_size)
    assert mixture_of(spelt, backbone) == mixture_of(backbone.moe, backbone)
    assert mixture_of(spelt, backbone).keys() == {*MIXTURE, "placement"}
    free = replace(backbone.moe, moe_aux_loss_coeff=0.5, moe_grouped_gemm=False, moe_token_dispatcher_type="allgather")
    assert mixture_of(free, backbone) == mixture_of(backbone.moe, backbone)


def test_weights_sum_to_one_or_do_not():
    assert sums_to_one(MoEConfig()) and not sums_to_one(MoEConfig(moe_router_topk=1))
    assert sums_to_one(MoEConfig(moe_router_topk=1, normalize_top1=True))
    assert not sums_to_one(MoEConfig(moe_router_pre_softmax=True))


def test_a_dense_model_has_no_keys_of_experts():
    assert hf_experts_of(get_backbone("llama-tiny")) == {}
    assert "num_experts" not in hf_config_of(replace(get_backbone("qwen2-moe-tiny"), moe=None))
