"""What `adapter_config.json` says. tests/parity/test_lora.py loads such folders into `peft`."""

from types import SimpleNamespace

import pytest

from megatron_moellava.checkpoint.description import RunDescription
from megatron_moellava.config import ConfigError, LoraConfig, Modality, to_dict
from megatron_moellava.conversion.adapter_exports import _check_exportable, peft_config
from megatron_moellava.conversion.adapters import Line
from megatron_moellava.conversion.for_generation import levels_of_others
from megatron_moellava.conversion.recipes import Part
from tests.helpers.modalities import DEPTH


def line(module: str) -> Line:
    return Line(name=f"base_model.model.{module}.lora_A.weight", shape=(2, 4), part=Part("x", 0, 8))


def test_modules_are_adapted_gates_are_parameters_and_the_rest_is_saved_whole():
    lora = LoraConfig(rank=2, alpha=6.0, dropout=0.1)
    base = {"folder": "/runs/stage3/iter_0000100", "seal": "x"}
    config = peft_config(lora, [line("layers.0.q_proj")], ["projector.weight", "projector.bias"], base)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 6.0, 0.1)
    assert config["target_modules"] == ["layers.0.q_proj"] and config["target_parameters"] is None
    assert config["modules_to_save"] == ["projector"] and config["base_model_name_or_path"] == "stage3"
    config = peft_config(lora, [line("layers.0.mlp.gate"), line("layers.0.q_proj")], [], base)
    assert config["target_modules"] == ["layers.0.q_proj"] and config["modules_to_save"] is None
    assert config["target_parameters"] == ["layers.0.mlp.gate.weight"] and config["lora_dropout"] == 0.0


def test_levels_that_a_processor_of_others_would_show_otherwise_are_refused():
    said = {"trained_with": {"data": {"modalities": [to_dict(DEPTH)]}}}
    source = SimpleNamespace(folder="runs/lora", run=RunDescription(iteration=1, model={}, provenance=said))
    with pytest.raises(ConfigError, match=r"runs/lora: data.modalities has depth, whose levels .*convert merge"):
        _check_exportable(source, None, [])
    colours = {"data": {"modalities": [to_dict(Modality(name="night", levels="colours"))]}}
    assert levels_of_others(colours) == levels_of_others({}) == ""
