"""Switches of the parallel engine: what is on by itself, what Megatron-Core is told, and which runs are refused."""

from dataclasses import replace

from megatron_moellava import platform
from megatron_moellava.backbones import BACKBONES
from megatron_moellava.model.configuration import transformer_config
from tests.helpers.runs import tiny

# --- context parallelism ----------------------------------------------------------------------------------------------


# --- switches ---------------------------------------------------------------------------------------------------------


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


# --- the load report --------------------------------------------------------------------------------------------------
