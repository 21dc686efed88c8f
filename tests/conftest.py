"""What every test leaves behind for the next one in the same process."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_loss_scale_is_left_behind():
    """Megatron-Core keeps the scale of the auxiliary loss on a class: a backward pass without a schedule puts a scalar
    there, into which the next schedule's vector does not fit."""
    yield
    moe_utils = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe_utils is not None:
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
