"""What `training.precision=auto` stands for before any process has started."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.checkpoint.description import RunDescription, write_description
from megatron_moellava.config import CheckpointConfig, ConfigError, to_dict
from megatron_moellava.machine import GPU_CLUSTER, Machine
from megatron_moellava.validation.precision import decided
from megatron_moellava.validation.run import layout_problems, validate
from tests.helpers.runs import tiny

CPU = Machine(has_gpu=False, has_transformer_engine=False)


pytestmark = pytest.mark.usefixtures("avx2")


def saved(folder, precision: str):
    """A run whose first checkpoint says so."""
    run = replace(tiny(training__precision=precision), checkpoint=CheckpointConfig(save=str(folder)))
    (folder / "iter_0000003").mkdir(parents=True)
    description = RunDescription(iteration=3, stage=3, optimizer_steps=3, model={"moe": None}, config=to_dict(run))
    write_description(folder / "iter_0000003", description)
    return replace(run, training=replace(run.training, precision="auto"))


def test_a_named_precision_stays_and_needs_no_reason():
    for named in ("bf16", "fp32"):
        run = tiny(training__precision=named)
        assert decided(run, CPU) == (run, "")


@pytest.mark.parametrize(("machine", "precision"), [(CPU, "fp32"), (GPU_CLUSTER, "bf16")])
def test_a_new_run_takes_what_the_machine_is_fast_in(machine, precision, tmp_path):
    run = replace(tiny(training__precision="auto"), checkpoint=CheckpointConfig(save=str(tmp_path)))
    found, reason = decided(run, machine)
    assert found == replace(run, training=replace(run.training, precision=precision)) and reason


@pytest.mark.parametrize(("machine", "before"), [(CPU, "bf16"), (GPU_CLUSTER, "fp32")])
def test_a_run_that_goes_on_keeps_the_precision_of_its_checkpoint(machine, before, tmp_path):
    found, reason = decided(saved(tmp_path, before), machine)
    assert (found.training.precision, reason) == (before, "iter_0000003 goes on in it")


def test_rules_about_precision_hold_for_what_auto_stands_for():
    run = tiny(training__precision="auto", moe__moe_router_dtype="bf16")
    with pytest.raises(ConfigError, match=r"moe_router_dtype=bf16 with training\.precision=fp32"):
        validate(run, 1, CPU)
    run = replace(run, training=replace(run.training, device="auto"))
    assert layout_problems(run, get_backbone("llama-tiny"), 1) == []
