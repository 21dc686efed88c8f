"""What `adapter_config.json` says. tests/parity/test_lora.py loads such folders into `peft`."""

from megatron_moellava.config import LoraConfig
from megatron_moellava.conversion.adapter_exports import peft_config
from megatron_moellava.conversion.adapters import Line
from megatron_moellava.conversion.recipes import Part


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
