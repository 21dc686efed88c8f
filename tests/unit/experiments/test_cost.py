"""What a token costs: beside every arm of a comparison."""

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import MoEConfig, load_config
from megatron_moellava.experiments.cost import cost_of
from megatron_moellava.towers import get_tower

EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 1, "placement": "dense"}


def test_the_experts_cost_a_token_nothing_but_the_router():
    """Eight experts in each of four layers of 128, one per token: FLOPs as the dense model's, eight times its FFN."""
    backbone, tower = get_backbone("llama-tiny"), get_tower("clip-tiny")
    dense_run = load_config(None, ["model.backbone=llama-tiny", "model.tower=clip-tiny", "training.stage=2"])
    moe_run = load_config(
        None,
        ["model.backbone=llama-tiny", "model.tower=clip-tiny", "training.stage=3"]
        + [f"moe.{name}={value}" for name, value in EXPERTS.items()],
    )
    assert moe_run.moe == MoEConfig(**EXPERTS)
    dense, moe = cost_of(dense_run, backbone, tower), cost_of(moe_run, backbone, tower)
    router = 128 * 8 * 4
    assert moe["flops_per_token"] - dense["flops_per_token"] == 2 * router
    assert moe["activated"] - dense["activated"] == router
    assert moe["total"] - dense["total"] == router + 7 * 4 * 3 * 128 * 384


def test_attention_to_a_longer_text_costs_more():
    run = load_config(None, ["model.backbone=llama-tiny", "model.tower=clip-tiny", "training.stage=2"])
    backbone, tower = get_backbone("llama-tiny"), get_tower("clip-tiny")
    short, long = (cost_of(run, backbone, tower, length)["flops_per_token"] for length in (64, 128))
    assert (
        long - short == 2 * 64 * 128 * 4
    )  # both products over half of 64 more keys (causal), 128 wide, in four layers
