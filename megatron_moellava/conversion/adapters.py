"""Adapters in the format of `peft` and adapter checkpoints: which tensor is which elements of which.

Both sides have an A and a B for each projection; ours lie behind each other, expert by expert, so a conversion is again a
copy of element ranges (adapter_exports.py, adapter_imports.py). `fused_experts.py` has the exception.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moellava.config import ConfigError, LoraConfig, from_dict
from megatron_moellava.conversion import fused_experts, huggingface
from megatron_moellava.conversion.layout import OWN, Layout, entries
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint
from megatron_moellava.conversion.recipes import Part, Recipe, check
from megatron_moellava.costs.adapters import PREFIX, Adapted, adapted_matrices, adapter_tensors, b_name
from megatron_moellava.costs.shapes import Model, megatron_tensors
from megatron_moellava.mapping import Shape

CONFIG_FILE, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PEFT = "base_model.model."  # in front of every name


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One tensor of peft, and the elements of ours that it equals."""

    name: str
    shape: Shape
    part: Part


def lines(model: Model, lora: LoraConfig, layout: Layout) -> list[Line]:
    """Every A and B of a model whose modules `layout` names; of a layout without such modules none."""
    found: list[Line] = []
    for adapted, names in _named(model, lora, layout):
        if not (layout is OWN and _is_fused(model, adapted)):
            found += _of_matrix(adapted, lora, names)
    return found


def _named(model: Model, lora: LoraConfig, layout: Layout) -> Iterator[tuple[Adapted, tuple[str, ...]]]:
    """(matrix, names of its weights in the layout), one name for each projection of each expert."""
    by_name = {entry.megatron: entry.names for entry in entries(model, layout)}
    for adapted in adapted_matrices(model, lora):
        names = by_name.get(f"{adapted.name}.weight", ())
        if len(names) == len(adapted.parts) * max(adapted.experts, 1):
            yield adapted, names


def _is_fused(model: Model, adapted: Adapted) -> bool:
    """Whether transformers keeps all experts of this matrix in one tensor: in its own classes of mixtures."""
    return fused_experts.is_fused(adapted) and not huggingface.needs_modelling_file(model)


def fused_matrices(model: Model, lora: LoraConfig) -> list[tuple[Adapted, tuple[str, ...]]]:
    """(matrix, names of its weights) of the experts that transformers keeps in one tensor."""
    return [(adapted, names) for adapted, names in _named(model, lora, OWN) if _is_fused(model, adapted)]


def _of_matrix(adapted: Adapted, lora: LoraConfig, names: tuple[str, ...]) -> Iterator[Line]:
    count = len(adapted.parts)
    for number, name in enumerate(names):
        expert, place = divmod(number, count)
        part, rows = adapted.parts[place]
        module = PEFT + name.removesuffix(".weight")
        first = {key: 0 if adapted.is_shared(key, lora) else expert for key in ("a", "b")}
        size = lora.rank * adapted.columns
        a = Part(f"{PREFIX}{adapted.name}.a", (first["a"] * count + place) * size, size)
        yield Line(name=f"{module}.lora_A.weight", shape=(lora.rank, adapted.columns), part=a)
        b = Part(f"{PREFIX}{adapted.name}.{b_name(part)}", first["b"] * rows * lora.rank, rows * lora.rank)
        yield Line(name=f"{module}.lora_B.weight", shape=(rows, lora.rank), part=b)


def fused_names(adapted: Adapted, names: tuple[str, ...]) -> list[str]:
    """What peft calls the A and the B of a matrix of all experts."""
    root = fused_experts.module_of(names) + fused_experts.FUSED[adapted.name.rpartition(".")[2]][1]
    return [f"{PEFT}{root}.lora_{letter}.weight" for letter in "AB"]


def adapter_of(source: Checkpoint) -> dict:
    """What an adapter checkpoint says of its settings and its base. ConfigError for a whole model."""
    if source.run.adapter is None:
        raise ConfigError(
            f"{source.folder} is a whole model and no adapter; give a checkpoint of a run with training.lora"
        )
    return source.run.adapter


def lora_of(source: Checkpoint) -> LoraConfig:
    """The settings of an adapter checkpoint. ConfigError for a whole model."""
    return from_dict(LoraConfig, adapter_of(source)["lora"])


def check_adapter(source: Checkpoint) -> None:
    """CheckpointError unless all its adapters are there, and what it holds whole is of the model."""
    wanted = {name: shape for name, shape in megatron_tensors(source.model).items() if name in source.tensors}
    wanted |= {name: tensor.shape for name, tensor in adapter_tensors(source.model, lora_of(source)).items()}
    needed = [Recipe(name, shape, "", (Part(name, 0, math.prod(shape)),)) for name, shape in wanted.items()]
    check(needed, source.tensors, what=str(source.folder), expected=wanted)
