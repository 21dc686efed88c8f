"""Settings of a training that cannot work."""

from dataclasses import replace

import pytest

from megatron_moellava.config import (
    ConfigError,
    LoggingConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_moellava.validation.run import validate
from tests.helpers.inference_models import tiny_run
from tests.helpers.runs import problems


def test_runs_in_fp8_that_cannot_work_are_refused():
    assert "delayed recipe covers all layers" in problems(
        1, training__fp8_recipe="delayed", training__num_layers_at_start_in_bf16=1
    )
    assert "multiple of 32 for training.fp8_recipe=mxfp8" in problems(
        1, training__fp8_recipe="mxfp8", data__seq_length=144
    )
    assert "multiple of" not in problems(1, training__fp8_recipe="tensorwise", data__seq_length=144)


@pytest.mark.parametrize("changes, message", [
    ({"moe": MoEConfig(moe_router_dtype="bf16")}, "set training.precision=bf16"),
    ({"optimizer": OptimizerConfig(router_lr_warmup_fraction=1.5)}, "router_lr_warmup_fraction=1.5 must lie between 0 and 1"),
    ({"moe": None, "optimizer": OptimizerConfig(router_lr_warmup_fraction=0.1)}, "needs a MoE model"),
    ({"logging": LoggingConfig(routing_interval=0)}, "logging.routing_interval=0 must be at least 1"),
    ({"logging": LoggingConfig(straggler_interval=-1)}, "logging.straggler_interval=-1 must be 0"),
    ({"parallel": ParallelConfig(distributed_timeout_minutes=0)}, "distributed_timeout_minutes=0 must be positive"),
])  # fmt: skip
def test_validation_says_what_is_wrong(changes, message):
    with pytest.raises(ConfigError) as error:
        validate(replace(tiny_run(MoEConfig()), **changes), 1)
    assert message in str(error.value)
