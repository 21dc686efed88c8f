"""How long rows and samples may be: checked before any weight is touched, and reported with both numbers."""

import pytest
import torch

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_moellava.data.batch import Batch
from megatron_moellava.training.metrics import attention_cost, costs, imbalance
from megatron_moellava.validation.run import validate
from tests.helpers.data_files import ASSETS, config, make_set


def problems(data: DataConfig, backbone: str) -> str:
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
    assert problems(data(seq_length=4 * limit), backbone) == ""
    assert problems(data(seq_length=limit, packing=False), backbone) == ""
    text = problems(data(seq_length=limit + 1, packing=False), backbone)
    assert text.startswith(f"data.seq_length={limit + 1} is more than max_position_embeddings={limit} ({backbone})")
    assert f"use at most {limit}, or set data.packing=true" in text


def test_no_sample_is_longer_than_a_sliding_window(data):
    backbone = get_backbone("mistral-7b-v0.1")
    assert backbone.context_length == backbone.sliding_window == 4096 < backbone.max_position_embeddings
    text = problems(data(seq_length=8192, packing=False), backbone.name)
    assert "data.seq_length=8192 is more than sliding_window=4096 (mistral-7b-v0.1)" in text
    assert problems(data(seq_length=8192), backbone.name) == ""
    text = problems(data(seq_length=8192, max_sample_length=5000), backbone.name)
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
    assert message in problems(data(**change), "phi-2")


def row(lengths: list[int], images: int) -> Batch:
    """A packed row of `lengths`, whose last is padding, with so many image tokens at its start."""
    size = sum(lengths)
    tokens_BS = torch.ones(1, size, dtype=torch.int64)
    tokens_BS[0, :images] = -200
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=tokens_BS,
        position_ids_BS=tokens_BS,
        padding_mask_BS=(torch.arange(size) < size - lengths[-1])[None],
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        pixel_values_NCHW=torch.zeros(0),
    )


def test_imbalance_is_the_busiest_rank_over_the_mean():
    assert costs([row([3, 4, 1], 2), row([8, 0], 5)]) == [15, 7, 9 + 16 + 1 + 64]
    padded = row([4, 4], 0)
    padded.cu_seqlens, padded.tokens_BS = None, torch.zeros(2, 4)
    assert attention_cost(padded) == 32
    found = imbalance(torch.tensor([[10.0, 0.0, 4.0], [10.0, 6.0, 12.0]]))
    assert found == {"imbalance/tokens": 1.0, "imbalance/image_tokens": 2.0, "imbalance/attention": 1.5}
    assert imbalance(torch.tensor([[7.0, 0.0, 3.0]]))["imbalance/image_tokens"] == 1.0  # no picture anywhere is even
