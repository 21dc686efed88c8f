"""The kinds of routers as data, complete and obeyed by validation."""

import dataclasses

import pytest

from megatron_moellava.config import ConfigError, ExpertGroups, MoEConfig
from megatron_moellava.model.router_kinds import MODULES
from megatron_moellava.routers import ROUTERS, admissible_experts, experts_by_group, knows_modality, own_experts
from megatron_moellava.validation.run import validate
from tests.helpers.inference_models import tiny_run


def test_every_kind_has_a_module_and_is_found_by_its_own_name():
    assert ROUTERS.keys() == MODULES.keys()
    assert all(name == kind.name for name, kind in ROUTERS.items())


def test_what_a_kind_cannot_honour_are_fields_of_a_run():
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    for kind in ROUTERS.values():
        assert set(kind.lacks) <= fields


def test_the_originals_gate_counts_padding_over_the_whole_sequence():
    original, megatron = ROUTERS["original"], ROUTERS["megatron"]
    assert original.counts_padding and original.counts_whole_sequence and original.always_has_capacity
    assert not (original.allows_packing or original.allows_context_parallelism) and original.max_topk == 2
    assert not (megatron.counts_padding or megatron.always_has_capacity) and megatron.max_topk is None


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"moe_router_topk": 3}, "the original router has at most 2"),
        ({"moe_expert_capacity_factor": None}, "the original router always has one"),
        ({"moe_z_loss_coeff": 0.1}, "the original router has no such thing"),
        ({"moe_router_enable_expert_bias": True}, "the original router has no such thing"),
        ({"expert_groups": ExpertGroups(image=2, text=2)}, "the original router has no such thing"),
        ({"balance_per_modality": True}, "the original router has no such thing"),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "the original router has aux_loss or none"),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, "the original router has aux_loss or none"),
    ],
)
def test_what_a_kind_of_router_cannot_do_is_refused(moe, message):
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(MoEConfig(**{"router": "original", "moe_expert_capacity_factor": 1.5} | moe)), 1)


def test_experts_of_a_modality_are_neighbours_or_dealt():
    """Binned on two ranks of four: one has the image experts, the other those of text, and both a shared one."""
    binned = ExpertGroups(image=3, text=3, shared=2)
    assert experts_by_group(binned) == ("image",) * 3 + ("shared",) * 2 + ("text",) * 3
    dealt = ExpertGroups(image=4, text=2, shared=2, order="dealt")
    assert experts_by_group(dealt) == ("image", "image", "shared", "text") * 2
    assert experts_by_group(ExpertGroups(image=0, text=0, order="dealt")) == ()


def test_a_token_has_the_experts_of_its_modality_and_the_shared_ones():
    hard = MoEConfig(num_moe_experts=5, expert_groups=ExpertGroups(image=1, text=2, shared=2))
    assert own_experts(hard) == admissible_experts(hard) == ((1, 2, 3, 4), (0, 1, 2))
    soft = MoEConfig(num_moe_experts=5, expert_groups=ExpertGroups(image=1, text=2, shared=2, penalty=1.0))
    assert own_experts(soft) == own_experts(hard)
    assert admissible_experts(soft) == own_experts(MoEConfig(num_moe_experts=5)) == ((0, 1, 2, 3, 4),) * 2
    assert knows_modality(soft) and knows_modality(MoEConfig(balance_per_modality=True))
    assert not knows_modality(MoEConfig()) and not knows_modality(None)
