"""The kind of a run, and what it asks of its routers, choose the module."""

import pytest

from megatron_moellava.config import ExpertGroups, MoEConfig
from megatron_moellava.model.modality_router import ModalityRouter
from megatron_moellava.model.router import MegatronRouter, OriginalRouter
from megatron_moellava.model.router_kinds import router_builder


def test_the_kind_of_a_run_chooses_the_module():
    assert router_builder(MoEConfig()) is MegatronRouter
    normalizing = router_builder(MoEConfig(moe_router_topk=1, normalize_top1=True))
    assert (normalizing.func, normalizing.keywords) == (MegatronRouter, {"normalizes_top1": True})
    original = router_builder(MoEConfig(router="original", moe_expert_capacity_factor=1.0))
    assert original.func is OriginalRouter and original.keywords["moe"].router == "original"


@pytest.mark.parametrize("settings", [{"balance_per_modality": True}, {"expert_groups": ExpertGroups(image=2, text=2)}])
def test_routers_are_told_the_modality_only_where_they_ask(settings):
    moe = MoEConfig(moe_router_topk=1, normalize_top1=True, **settings)
    builder = router_builder(moe)
    assert (builder.func, builder.keywords) == (ModalityRouter, {"moe": moe, "normalizes_top1": True})
