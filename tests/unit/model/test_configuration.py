"""Switches of the parallel engine: what is on by itself, what Megatron-Core is told, and which runs are refused."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel, platform
from megatron_moellava.backbones import BACKBONES
from megatron_moellava.config import ConfigError, ParallelConfig, RunConfig, from_dict, set_override
from megatron_moellava.model.configuration import transformer_config
from megatron_moellava.model.context_parallel import Piece, attention_pieces, chunks_of_rank
from megatron_moellava.training.metrics import load_imbalance
from megatron_moellava.training.optimizer import overlaps
from megatron_moellava.training.validate import validate


def tiny(**fields) -> RunConfig:
    tree: dict = {"model": {"backbone": "llama-tiny", "tower": "clip-tiny"}, "training": {"stage": 3, "device": "cpu"}}
    for name, value in {"moe.num_moe_experts": 4, "data.seq_length": 128, **fields}.items():
        set_override(tree, name.replace("__", "."), value)
    return from_dict(RunConfig, tree)


def problems(world_size: int, **fields) -> str:
    with pytest.raises(ConfigError) as refused:
        validate(tiny(**fields), world_size)
    return str(refused.value)


# --- context parallelism ----------------------------------------------------------------------------------------------


def test_every_rank_has_early_and_late_positions_and_nobody_shares_one():
    chunks = [chunks_of_rank(24, 3, rank) for rank in range(3)]
    assert chunks[0] == ((0, 4), (20, 24))
    held = sorted(position for rank in chunks for start, stop in rank for position in range(start, stop))
    assert held == list(range(24))
    work = [sum(position + 1 for start, stop in rank for position in range(start, stop)) for rank in chunks]
    assert len(set(work)) == 1  # of causal attention over one sample


def test_pieces_end_at_the_boundaries_of_samples_and_chunks():
    pieces = list(attention_pieces(((0, 2), (6, 8)), [0, 3, 8]))
    assert pieces == [Piece(slice(0, 2), slice(0, 2)), Piece(slice(2, 4), slice(3, 8))]
    for rank in range(2):  # every query sees exactly the keys of its sample up to itself
        chunks = chunks_of_rank(16, 2, rank)
        mine = [position for start, stop in chunks for position in range(start, stop)]
        for piece in attention_pieces(chunks, [0, 5, 6, 16]):
            queries = mine[piece.queries]
            assert queries[-1] == piece.keys.stop - 1
            assert all(max(start for start in (0, 5, 6) if start <= q) == piece.keys.start for q in queries)


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


# --- switches ---------------------------------------------------------------------------------------------------------


def test_overlap_is_on_by_itself_on_gpus_only():
    parallel.initialize(ParallelConfig(), seed=1)
    assert overlaps(tiny()) == (False, False)
    assert overlaps(tiny(optimizer__overlap_grad_reduce=True)) == (True, False)
    assert overlaps(tiny(optimizer__overlap_grad_reduce=True, optimizer__overlap_param_gather=True)) == (True, True)
    parallel.shutdown()
    message = problems(1, optimizer__overlap_grad_reduce=False, optimizer__overlap_param_gather=True)
    assert "needs overlap_grad_reduce" in message


def test_gpu_runs_hand_the_recipe_to_transformer_engine(monkeypatch):
    from megatron_moellava.model import configuration

    run = tiny(training__fp8_recipe="blockwise", training__num_layers_at_end_in_bf16=1)
    here = transformer_config(BACKBONES["llama-tiny"], run)
    assert here.fp8 is None and here.first_last_layers_bf16 and here.num_layers_at_end_in_bf16 == 1
    monkeypatch.setattr(platform, "HAS_TRANSFORMER_ENGINE", True)
    fields = configuration._fp8_fields(run)
    assert (fields["fp8"], fields["fp8_recipe"]) == ("e4m3", "blockwise")
    delayed = configuration._fp8_fields(replace(run, training=replace(run.training, fp8_recipe="delayed")))
    assert (delayed["fp8"], delayed["fp8_amax_history_len"], delayed["fp8_amax_compute_algo"]) == (
        "hybrid",
        1024,
        "max",
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


# --- the load report --------------------------------------------------------------------------------------------------


def test_load_of_the_busiest_rank_and_expert():
    load_LE = torch.tensor([[6, 2, 1, 3], [3, 3, 3, 3]])
    report = load_imbalance(load_LE, 2)
    assert report == {"routing/imbalance/expert": 2.0, "routing/imbalance/rank": pytest.approx(8 / 6)}
    assert load_imbalance(torch.zeros(2, 4), 4) == {"routing/imbalance/expert": 0.0, "routing/imbalance/rank": 0.0}
