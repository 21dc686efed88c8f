"""How long rows and samples may be: checked before any weight is touched, and reported with both numbers."""

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    from_dict,
)
from megatron_moellava.validation.run import validate
from tests.helpers.data_files import ASSETS, config, make_set


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
    ],
)
def test_a_wrong_field_says_what_is_right(data, change, message):
    assert message in limits_said(data(**change), "phi-2")


def test_rows_may_be_longer_than_the_context_where_text_is_what_counts(data):
    assert limits_said(data(seq_length=4096, packing=False, length_counts="text"), "phi-2") == ""
    with pytest.raises(ConfigError, match=r"length_counts='texts' is not supported.*positions, text"):
        from_dict(DataConfig, {"length_counts": "texts"})
