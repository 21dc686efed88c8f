"""Small runs on the CPU as configurations."""

from pathlib import Path

import pytest

from megatron_moellava.config import (
    ConfigError,
    RunConfig,
    from_dict,
    set_override,
)
from megatron_moellava.validation.run import validate
from tests.helpers.paths import ASSETS


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


def over_rows(rows: Path, stage: int, load: Path, **data) -> RunConfig:
    """A run over a file of rows, whose pictures lie beside it, from a checkpoint of llama-tiny; `data`: its further fields."""
    return from_dict(
        RunConfig,
        {
            "model": {"backbone": "llama-tiny", "tower": "clip-tiny"},
            "moe": {},
            "data": {
                "sources": [{"path": str(rows), "image_folder": str(rows.parent)}],
                "tokenizer": str(ASSETS / "tok_spm"),
                "template": "v1",
                "seq_length": 512,
                "num_workers": 0,
            }
            | data,
            "training": {"stage": stage, "precision": "fp32", "global_batch_size": 1},
            "checkpoint": {"load": str(load)},
        },
    )
