"""A run as data: what is read from YAML files, command lines and older checkpoints."""

import json

import pytest

from megatron_moellava import config
from megatron_moellava.checkpoint.description import RunDescription, read_description, write_description
from megatron_moellava.config import (
    ConfigError,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    from_dict,
    load_config,
)
from megatron_moellava.costs.shapes import model_from_json

OLD = {"num_experts": 6, "capacity_factor": 1.25, "router_dtype": "bf16", "experts": "sequential"}
NEW = MoEConfig(num_moe_experts=6, moe_expert_capacity_factor=1.25, moe_router_dtype="bf16", moe_grouped_gemm=False)
RUN = {"model": {"backbone": "phi-2-tiny"}, "training": {"stage": 3}}


@pytest.fixture(autouse=True)
def forget_notes():
    config.say_renamed.cache_clear()


def test_old_spellings_of_a_yaml_file_are_read_with_one_note_each(tmp_path, capsys):
    file = tmp_path / "old.yaml"
    file.write_text(json.dumps({**RUN, "moe": OLD, "training": {"stage": 3, "fp8": "delayed"}}))
    run = load_config(str(file), ["moe.num_experts=6"])
    assert run.moe == NEW and run.training.fp8_recipe == "delayed"
    notes = capsys.readouterr().err.splitlines()
    assert sorted(notes) == sorted(f"note: {old} is now {new}" for old, new in config.RENAMED.items())


def test_old_spellings_of_the_command_line_win_over_the_file(tmp_path):
    file = tmp_path / "new.yaml"
    file.write_text(json.dumps({**RUN, "moe": {"num_moe_experts": 2, "moe_grouped_gemm": True}}))
    overrides = [f"moe.{name}={value}" for name, value in OLD.items()]
    assert load_config(str(file), overrides).moe == NEW


def test_a_checkpoints_old_spellings_are_read_silently(tmp_path, capsys):
    model = {"backbone": "phi-2-tiny", "moe": OLD}
    write_description(tmp_path, RunDescription(iteration=0, model=model, config={**RUN, "moe": OLD}))
    description = read_description(tmp_path)
    assert from_dict(MoEConfig, description.model["moe"]) == NEW
    assert from_dict(RunConfig, description.config).moe == NEW
    assert model_from_json(model).moe == NEW
    assert capsys.readouterr() == ("", "")


def test_both_spellings_of_a_field_with_different_values_are_an_error(tmp_path):
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps({**RUN, "moe": {"num_experts": 4, "num_moe_experts": 8}}))
    with pytest.raises(ConfigError, match=r"moe\.num_experts is now moe\.num_moe_experts, and both are given"):
        load_config(str(file))
    file.write_text(json.dumps({**RUN, "moe": {"num_experts": 4, "num_moe_experts": 4}}))
    assert load_config(str(file)).moe.num_moe_experts == 4


def test_every_new_name_is_a_field():
    sections = config.to_dict(from_dict(RunConfig, {**RUN, "moe": {}}))
    for old, new in config.RENAMED.items():
        section, name = new.split(".")
        assert name in sections[section] and old.split(".")[1] not in sections[section]


@pytest.mark.parametrize(
    ("recipe", "tensor", "context", "expected"),
    [(None, 4, 1, 4), ("delayed", 1, 1, 16), ("tensorwise", 2, 1, 16), ("tensorwise", 4, 1, 32), ("blockwise", 8, 1, 64),
     ("mxfp8", 2, 1, 64), ("tensorwise", 4, 2, 64)],
)  # fmt: skip
def test_fp8_fills_rows_so_that_each_rank_has_eight(recipe, tensor, context, expected):
    """Transformer Engine asks each tensor-parallel rank for a multiple of 8 rows (MXFP8: 32), of the products for 16."""
    run = RunConfig(
        model=ModelConfig(backbone="llama-tiny"),
        training=TrainingConfig(stage=2, fp8_recipe=recipe),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor, context_parallel_size=context),
    )
    assert run.row_multiple == expected
