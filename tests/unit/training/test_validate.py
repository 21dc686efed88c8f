"""Runs that cannot work are refused with the field, the value and the way out."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import BACKBONES, get_backbone
from megatron_moellava.config import (
    ConfigError,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_moellava.model.configuration import transformer_config
from megatron_moellava.training.validate import validate
from tests.helpers.data_files import ASSETS, config, make_set
from tests.helpers.inference_models import tiny_run
from tests.helpers.runs import problems, tiny


def test_rows_must_be_cut_into_two_chunks_per_rank_on_a_multiple_of_the_tensor_parallel_size():
    assert "multiple of 8" in problems(4, parallel__context_parallel_size=2, parallel__tensor_model_parallel_size=2,
                                       data__seq_length=132)  # fmt: skip
    assert "seq_length" not in problems(4, parallel__context_parallel_size=2, parallel__tensor_model_parallel_size=2)
    assert "original router counts places" in problems(
        2,
        parallel__context_parallel_size=2,
        moe__router="original",
        moe__moe_expert_capacity_factor=1.0,
        data__packing=False,
    )


def test_runs_in_fp8_that_cannot_work_are_refused():
    assert "delayed recipe covers all layers" in problems(
        1, training__fp8_recipe="delayed", training__num_layers_at_start_in_bf16=1
    )
    assert "multiple of 32 for training.fp8_recipe=mxfp8" in problems(
        1, training__fp8_recipe="mxfp8", data__seq_length=144
    )
    assert "multiple of" not in problems(1, training__fp8_recipe="tensorwise", data__seq_length=144)


def test_deepep_is_a_matter_of_configuration():
    """Megatron-Core accepts the flex dispatcher with DeepEP's backend; only a GPU can run it."""
    run = tiny(moe__moe_token_dispatcher_type="flex", parallel__expert_model_parallel_size=2)
    config = transformer_config(BACKBONES["llama-tiny"], run)
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert config.moe_router_dtype == "fp32"  # DeepEP takes no other weights
    assert "needs GPUs" in problems(2, moe__moe_token_dispatcher_type="flex", parallel__expert_model_parallel_size=2)


def test_split_of_stages_must_fit():
    pipeline = {"parallel__pipeline_model_parallel_size": 2}
    assert "must be 2 numbers" in problems(2, **pipeline, parallel__pipeline_split=[1, 2, 1])
    assert "in all 4" in problems(2, **pipeline, parallel__pipeline_split=[2, 3])
    assert "is unknown" in problems(2, **pipeline, parallel__pipeline_split="costs")
    assert "pipeline_split" not in problems(2, **pipeline, parallel__pipeline_split=[1, 3])


def limits_said(data: DataConfig, backbone: str) -> str:
    run = RunConfig(
        model=ModelConfig(backbone=backbone),
        training=TrainingConfig(stage=2, global_batch_size=1),
        data=data,
    )
    try:
        validate(run, 1)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def data(tmp_path):
    path = make_set(tmp_path, 4)
    return lambda **changes: config(path, tokenizer=str(ASSETS / "tok_bpe"), **changes)


@pytest.mark.parametrize("backbone, limit", [("phi-2", 2048), ("llama-2-7b", 4096)])
def test_a_packed_row_may_be_longer_than_the_context_and_a_padded_one_may_not(data, backbone, limit):
    assert limits_said(data(seq_length=4 * limit), backbone) == ""
    assert limits_said(data(seq_length=limit, packing=False), backbone) == ""
    text = limits_said(data(seq_length=limit + 1, packing=False), backbone)
    assert text.startswith(f"data.seq_length={limit + 1} is more than max_position_embeddings={limit} ({backbone})")
    assert f"use at most {limit}, or set data.packing=true" in text


def test_no_sample_is_longer_than_a_sliding_window(data):
    backbone = get_backbone("mistral-7b-v0.1")
    assert backbone.context_length == backbone.sliding_window == 4096 < backbone.max_position_embeddings
    text = limits_said(data(seq_length=8192, packing=False), backbone.name)
    assert "data.seq_length=8192 is more than sliding_window=4096 (mistral-7b-v0.1)" in text
    assert limits_said(data(seq_length=8192), backbone.name) == ""
    text = limits_said(data(seq_length=8192, max_sample_length=5000), backbone.name)
    assert "data.max_sample_length=5000 must be at most sliding_window=4096" in text and "use 4096" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_sample_length": 0}, "data.max_sample_length=0 must be at least 1"),
        (
            {"max_sample_length": 300},
            "data.max_sample_length=300 must be at most max_position_embeddings=2048 (phi-2) and",
        ),
        ({"packing_buffer": 0}, "data.packing_buffer=0 must be at least 1"),
        ({"num_workers": -1}, "data.num_workers=-1 must be at least 0"),
        ({"max_skip_share": 1.5}, "data.max_skip_share=1.5 must lie between 0 (stop at the first bad row) and 1"),
        ({"long_samples": "drop"}, "data.long_samples='drop' is not supported; use one of: cut, skip"),
    ],
)
def test_a_wrong_field_says_what_is_right(data, change, message):
    assert message in limits_said(data(**change), "phi-2")


@pytest.mark.parametrize("changes, message", [
    ({"moe": MoEConfig(moe_router_dtype="fp16")}, "moe.moe_router_dtype='fp16' is not supported; use one of: fp32, bf16"),
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
