"""What experts and their dispatcher need."""

import pytest

from megatron_moellava.backbones import BACKBONES
from megatron_moellava.model.configuration import transformer_config
from tests.helpers.runs import problems, tiny


def test_deepep_is_a_matter_of_configuration():
    """Megatron-Core accepts the flex dispatcher with DeepEP's backend; only a GPU can run it."""
    run = tiny(moe__moe_token_dispatcher_type="flex", parallel__expert_model_parallel_size=2)
    config = transformer_config(BACKBONES["llama-tiny"], run)
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert config.moe_router_dtype == "fp32"  # DeepEP takes no other weights
    assert "needs GPUs" in problems(2, moe__moe_token_dispatcher_type="flex", parallel__expert_model_parallel_size=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training__recompute": "moe", "moe": None, "training__stage": 2}, "a dense model has no experts"),
        ({"training__recompute": "moe_act", "moe": None, "training__stage": 2}, "a dense model has no experts"),
        (
            {"training__recompute": "moe_act", "moe__moe_grouped_gemm": False},
            "one after the other keep their activation",
        ),
        ({"training__recompute": "moe_act", "training__lora": {}}, "adapters keep what the activation made"),
        ({"training__recompute": "moe_act", "training__fp8_recipe": "delayed"}, "recomputes no activation"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(fields, message):
    assert message in problems(1, **fields)


def test_the_activation_of_grouped_experts_can_be_recomputed():
    assert "training.recompute" not in problems(1, training__recompute="moe_act", moe__moe_router_topk=9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_groups.image": 2, "expert_groups.text": 1}, "has 3 experts, and moe.num_moe_experts=4"),
        ({"expert_groups.image": 3, "expert_groups.text": 1}, "leaves 1 experts to text tokens"),
        ({"expert_groups.image": -1, "expert_groups.text": 5}, "moe.expert_groups.image=-1 must be 0 or more"),
        ({"expert_groups.image": 2}, "moe.expert_groups.text is required"),
        (
            {"expert_groups.image": 2, "expert_groups.text": 2, "expert_groups.penalty": 0.0},
            "moe.expert_groups.penalty=0.0 must be positive",
        ),
        (
            {
                "expert_groups.image": 1,
                "expert_groups.text": 2,
                "expert_groups.shared": 1,
                "expert_groups.order": "dealt",
            },
            "have no common divisor",
        ),
        (
            {
                "expert_groups.image": 2,
                "expert_groups.text": 2,
                "moe_router_num_groups": 2,
                "moe_router_group_topk": 1,
                "moe_router_pre_softmax": True,
            },
            "with moe.moe_router_num_groups=2",
        ),
        ({"balance_per_modality": True, "moe_router_load_balancing_type": "none"}, "there is no loss"),
        (
            {
                "expert_groups.image": 2,
                "expert_groups.text": 2,
                "router": "original",
                "moe_expert_capacity_factor": 1.5,
            },
            "the original router has no such thing",
        ),
    ],
)
def test_groups_that_no_router_can_honour_are_refused(fields, message):
    assert message in problems(1, **{f"moe__{name}": value for name, value in fields.items()})


def test_a_penalty_leaves_a_token_all_experts_to_choose_from():
    fields = {"moe__expert_groups.image": 3, "moe__expert_groups.text": 1}
    assert "moe." in problems(1, **fields)
    assert "moe." not in problems(1, **fields, **{"moe__expert_groups.penalty": 2.0})  # but there are no data
