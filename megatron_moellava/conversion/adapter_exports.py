"""An adapter checkpoint -> a folder for `peft`. What was trained whole beside the adapters goes along as `modules_to_save`."""

import json
from dataclasses import replace
from pathlib import Path

from megatron_moellava.checkpoint.description import trained_with
from megatron_moellava.checkpoint.sums import write_sums
from megatron_moellava.config import ConfigError, LoraConfig
from megatron_moellava.conversion import fused_experts, huggingface
from megatron_moellava.conversion.adapters import (
    CONFIG_FILE,
    PEFT,
    WEIGHTS,
    Line,
    adapter_of,
    check_adapter,
    fused_matrices,
    lines,
    lora_of,
)
from megatron_moellava.conversion.for_generation import levels_of_others
from megatron_moellava.conversion.layout import OWN, entries
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint, open_checkpoint
from megatron_moellava.conversion.modality import check_no_branches
from megatron_moellava.conversion.recipes import Recipe, check, export_recipes, identity
from megatron_moellava.conversion.writers import Progress, staged, write_safetensors
from megatron_moellava.costs.adapters import PREFIX
from megatron_moellava.costs.shapes import EXPERTS, Model


def export_adapter(
    checkpoint: Path, *, save: Path, verify: bool = True, progress: Progress = lambda count: None
) -> dict:
    """Write an adapter checkpoint for `peft`, on top of its base as `export --layout transformers` writes it.

    Raises ConfigError or CheckpointError before anything is written.
    """
    source = open_checkpoint(checkpoint, verify=verify, adapter=True)
    check_no_branches(source.model, "peft's model in transformers")
    lora = lora_of(source)
    model = huggingface.as_transformers(source.model)
    found = lines(model, lora, OWN)
    whole = [entry for entry in entries(model, OWN) if entry.megatron in source.tensors]
    _check_exportable(source, model, [entry.megatron for entry in whole])
    check_adapter(source)
    fused = fused_matrices(model, lora)
    tensors = dict(source.tensors)
    for adapted, names in fused:
        tensors |= {PEFT + name: made for name, made in fused_experts.exported(adapted, lora, names, tensors)}
    recipes = [Recipe(line.name, line.shape, tensors[line.part.source].dtype, (line.part,)) for line in found]
    recipes += [identity(name, tensor) for name, tensor in tensors.items() if name not in source.tensors]
    recipes += [replace(recipe, name=PEFT + recipe.name) for recipe in export_recipes(whole, tensors)]
    held = [f"{PREFIX}{adapted.name}.{key}" for adapted, _ in fused for key in adapted.tensors(lora)]
    check(recipes, tensors, what=str(source.folder), dropped=held, copies=lora.shared_outer)
    config = peft_config(lora, found, [name for entry in whole for name in entry.names], adapter_of(source)["base"])
    if fused:
        parameters = [fused_experts.parameter_of(adapted, names) for adapted, names in fused]
        config["target_parameters"] = [*(config["target_parameters"] or []), *parameters]
        config |= {"lora_alpha": lora.scale * lora.rank, "use_rslora": False, "lora_dropout": 0.0}
        config |= fused_experts.patterns(lora) if model.backbone.gated_linear_unit else {}
    with staged(Path(save)) as staging:
        (staged_file := staging / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        write_safetensors(staging, recipes, tensors, progress)
        (staging / "model.safetensors").rename(staging / WEIGHTS[0])
        write_sums(staging, {})
    return {"folder": str(save), "tensors": len(recipes), "files": [staged_file.name, WEIGHTS[0]]}


def _check_exportable(source: Checkpoint, model: Model, whole: list[str]) -> None:
    merge = "; join it to its base and export that: moellava convert merge"
    if names := levels_of_others(trained_with(source.run)):
        raise ConfigError(
            f"{source.folder}: data.modalities has {names}, whose levels transformers' processors would show otherwise than "
            f"in training{merge}, then export --layout original"
        )
    if any(EXPERTS in name for name in whole) and not huggingface.needs_modelling_file(model):
        raise ConfigError(
            f"{source.folder}: experts were trained whole, and transformers keeps all experts of this model in one tensor, "
            f"which peft cannot save with an adapter{merge}"
        )
    embedded = [name for name in whole if ".embedding." in name or ".output_layer." in name]
    if embedded:
        raise ConfigError(
            f"{source.folder}: language.embedding was trained whole, which exports give other rows{merge}"
        )


def peft_config(lora: LoraConfig, found: list[Line], whole: list[str], base: dict) -> dict:
    """`adapter_config.json`. A gate is no linear layer, so its weight is a parameter for peft, which knows no dropout there."""
    modules = [line.name.removeprefix(PEFT).removesuffix(".lora_A.weight") for line in found if ".lora_A." in line.name]
    gates = [name for name in modules if name.endswith(".gate")]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": Path(base["folder"]).parent.name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if gates else lora.dropout,
        "use_rslora": lora.use_rslora,
        "bias": "none",
        "target_modules": [name for name in modules if name not in gates],
        "target_parameters": [f"{name}.weight" for name in gates] or None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "inference_mode": True,
    }
