"""Small runs on the CPU as configurations."""

import pytest

from megatron_moellava.config import (
    ConfigError,
    RunConfig,
    from_dict,
    set_override,
)
from megatron_moellava.validation.run import validate


def tiny(**fields) -> RunConfig:
    """A stage-3 run of llama-tiny; `moe__router="original"` sets a field."""
    training = {"stage": 3, "device": "cpu", "precision": "bf16"}
    tree: dict = {"model": {"backbone": "llama-tiny", "tower": "clip-tiny"}, "training": training}
    for name, value in {"moe.num_moe_experts": 4, "data.seq_length": 128, **fields}.items():
        set_override(tree, name.replace("__", "."), value)
    return from_dict(RunConfig, tree)


def problems(world_size: int, **fields) -> str:
    """What validation says against `tiny(**fields)` on that many processes."""
    with pytest.raises(ConfigError) as refused:
        validate(tiny(**fields), world_size)
    return str(refused.value)
