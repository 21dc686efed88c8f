"""Settings of a training that cannot work."""

import re
import shutil
from dataclasses import replace

import pytest

from megatron_moellava.config import (
    ConfigError,
    LoggingConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_moellava.machine import Machine, this_machine
from megatron_moellava.validation.run import validate
from megatron_moellava.validation.training import rate_problems, training_problems
from tests.helpers.inference_models import tiny_run
from tests.helpers.runs import problems, tiny


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


@pytest.mark.parametrize("fields, message", [
    ({"optimizer__lr": 0.0}, "optimizer.lr=0: no step would change anything"),
    ({"optimizer__roles__experts__lr": 1e-6, "optimizer__min_lr": 1e-5},
     "optimizer.min_lr=1e-05 is more than optimizer.roles.experts.lr=1e-06"),
    ({"optimizer__roles__router__min_lr": 1e-3}, "optimizer.min_lr=0.001 is more than optimizer.roles.router.lr=2e-05"),
    ({"optimizer__projector_lr": 1e-6, "optimizer__min_lr": 1e-5}, "more than optimizer.projector_lr=1e-06"),
    ({"optimizer__projector_lr": 1e-3, "optimizer__roles__projector__lr": 1e-4}, "are the same rate; drop one"),
    ({"optimizer__roles__tower__lr": 1e-4}, "optimizer.roles.tower: this run does not train it"),
    ({"optimizer__roles__adapters__weight_decay": 0.1}, "it trains experts, language, projector, router; leave it out"),
    ({"optimizer__roles__experts__weight_decay": -1.0}, "optimizer.roles.experts.weight_decay=-1.0 must be 0 or more"),
    ({"optimizer__muon_nesterov": True}, "optimizer.muon_nesterov=True is about optimizer.optimizer=muon"),
    ({"optimizer__lr_wsd_decay_iters": 5}, "is the cooldown of optimizer.lr_decay_style=WSD, and this run has cosine"),
    ({"optimizer__lr_decay_style": "WSD", "optimizer__lr_wsd_decay_iters": 0}, "lr_wsd_decay_iters=0 must be at least 1"),
    ({"optimizer__lr_decay_style": "WSD", "optimizer__lr_wsd_decay_iters": 98, "training__train_steps": 100},
     "lr_wsd_decay_iters=98 and 3 steps of warm-up are more than the run's 100 steps; use at most 97"),
])  # fmt: skip
def test_rates_that_cannot_be_meant_are_refused(fields, message):
    assert message in problems(1, **fields)


def test_rates_of_parts_are_no_problem_where_the_parts_are_trained():
    for fields in (
        {"optimizer__lr": 0.0, "optimizer__roles__router__lr": 1e-3},
        {"optimizer__lr_decay_style": "WSD", "optimizer__lr_wsd_decay_iters": 97, "training__train_steps": 100},
        {"training__stage": 2, "optimizer__projector_lr": 1e-3, "training__trains": ["experts"]},
    ):
        assert not list(rate_problems(tiny(**fields)))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_torch_compile_needs_a_compiler_for_a_cpu(monkeypatch, has_gpu):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("megatron_moellava.machine.sees_gpus", lambda: has_gpu)
    assert this_machine().has_compiler == has_gpu  # a GPU's kernels are Triton's


def test_to_compile_is_refused_without_a_compiler():
    machine = Machine(has_gpu=False, has_transformer_engine=False, has_compiler=False)
    said = " ".join(training_problems(tiny(training__compile=True), machine))
    assert re.search(r"no C\+\+ compiler \(.+\) here.*apt-get install g\+\+.*training.compile=false", said)
    assert "compiler" not in " ".join(training_problems(tiny(training__compile=False), machine))
