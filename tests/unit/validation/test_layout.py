"""Layouts that do not fit a model or a row are refused with the way out."""

from dataclasses import asdict

from megatron_moellava.backbones import get_backbone
from tests.helpers.runs import problems


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


def test_tensor_parallelism_divides_latents():
    own = {f"moe__{name}": value for name, value in asdict(get_backbone("deepseek-v3-tiny").moe).items()}
    found = problems(3, model__backbone="deepseek-v3-tiny", parallel__tensor_model_parallel_size=3, **own)
    assert "does not divide q_lora_rank=64" in found
    assert "does not divide kv_lora_rank + qk_pos_emb_head_dim=56" in found


def test_split_of_stages_must_fit():
    pipeline = {"parallel__pipeline_model_parallel_size": 2}
    assert "must be 2 numbers" in problems(2, **pipeline, parallel__pipeline_split=[1, 2, 1])
    assert "in all 4" in problems(2, **pipeline, parallel__pipeline_split=[2, 3])
    assert "did you mean cost?" in problems(2, **pipeline, parallel__pipeline_split="costs")
    assert "pipeline_split" not in problems(2, **pipeline, parallel__pipeline_split=[1, 3])
