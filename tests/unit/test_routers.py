"""The records of the kinds of routers: complete, and obeyed by validation."""

import pytest

from megatron_moellava.config import ConfigError, MoEConfig
from megatron_moellava.model.router import MODULES
from megatron_moellava.routers import ROUTERS
from megatron_moellava.training.validate import validate
from tests.helpers.inference_models import tiny_run


def test_every_kind_of_router_has_its_module():
    assert MODULES.keys() == ROUTERS.keys()
    assert all(kind.name == name for name, kind in ROUTERS.items())


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"moe_router_topk": 3}, "the original router has at most 2"),
        ({"capacity_factor": None}, "the original router always has one"),
        ({"moe_z_loss_coeff": 0.1}, "the original router has no such thing"),
        ({"moe_router_enable_expert_bias": True}, "the original router has no such thing"),
        ({"moe_router_load_balancing_type": "seq_aux_loss"}, "the original router has aux_loss or none"),
        ({"moe_router_load_balancing_type": "global_aux_loss"}, "the original router has aux_loss or none"),
    ],
)
def test_what_a_kind_of_router_cannot_do_is_refused(moe, message):
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(MoEConfig(**{"router": "original", "capacity_factor": 1.5} | moe)), 1)
