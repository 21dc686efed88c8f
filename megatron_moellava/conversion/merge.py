"""An adapter checkpoint and its base -> a whole model, whose matrices are W + scale * B A. Computed in fp32, one expert at
a time, while it is written."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_moellava.checkpoint.base import base_of
from megatron_moellava.checkpoint.description import CARRIED, converted, parent_of, trained_with
from megatron_moellava.config import LoraConfig
from megatron_moellava.conversion.adapters import check_adapter, lora_of
from megatron_moellava.conversion.megatron_checkpoint import check_complete, open_checkpoint, write_checkpoint
from megatron_moellava.conversion.recipes import Part, Recipe, identity
from megatron_moellava.conversion.tensors import Tensor, loaded
from megatron_moellava.conversion.writers import Progress
from megatron_moellava.costs.adapters import PREFIX, Adapted, adapted_matrices, b_name
from megatron_moellava.mapping import QKV


def merge_adapter(
    checkpoint: Path,
    *,
    save: Path,
    base: Path | None = None,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Write SAVE/iter_0000000. `base`: where the base lies, if not where it lay in training.

    Raises ConfigError or CheckpointError before anything is written: for a whole model, another base, tensors that miss.
    """
    adapter = open_checkpoint(checkpoint, verify=verify, adapter=True)
    lora = lora_of(adapter)
    found = base_of(adapter.folder, adapter.run, base)
    assert found is not None, "lora_of has refused whole models"
    under = open_checkpoint(found, verify=verify)
    check_complete(under)
    check_adapter(adapter)
    matrices = {f"{item.name}.weight": item for item in adapted_matrices(under.model, lora)}
    tensors, recipes = dict(under.tensors), []
    for name, tensor in under.tensors.items():
        if name in matrices:
            merged = _merged(matrices[name], tensor, adapter.tensors, lora)
            tensors |= merged
            parts = tuple(Part(made, 0, part.numel) for made, part in merged.items())
            recipes.append(Recipe(name, tensor.shape, tensor.dtype, parts))
        else:
            tensors[name] = adapter.tensors.get(name, tensor)  # trained whole
            recipes.append(identity(name, tensors[name]))
    begin(sum(recipe.nbytes for recipe in recipes))
    name = f"{adapter.folder.parent.name}/{adapter.folder.name}"
    provenance = converted(under.run, "merge", source=name, source_seal=adapter.run.checksum)
    provenance["trained_with"] = trained_with(adapter.run) or provenance["trained_with"]
    provenance["parent"] = parent_of(adapter.run, CARRIED)  # whose own parents are the base's
    model = replace(adapter.model, backbone=under.model.backbone)
    folder = write_checkpoint(
        save, model, recipes, tensors, stage=adapter.run.stage or 0, provenance=provenance, progress=progress
    )
    return {"folder": str(folder), "tensors": len(recipes), "merged": len(matrices), "base": str(under.folder)}


def _merged(adapted: Adapted, weight: Tensor, tensors: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """{name: W + scale * B A} of a matrix, or of each expert's. Nothing is read before it is written."""
    experts = max(adapted.experts, 1)
    shape = weight.shape[1:] if adapted.experts else weight.shape
    return {
        f"{adapted.name}.merged{number}": Tensor(
            shape, weight.dtype, make=partial(_sum, adapted, number, weight, tensors, lora)
        )
        for number in range(experts)
    }


def _sum(adapted: Adapted, expert: int, weight: Tensor, tensors: dict[str, Tensor], lora: LoraConfig):
    import torch

    def read(tensor: Tensor, shared: bool):
        parts = 1 if shared else max(adapted.experts, 1)
        count = tensor.numel // parts
        shape = tensor.shape[1:] if adapted.experts and not shared else tensor.shape
        return loaded(tensor, 0 if shared else expert * count, count).view(shape).float()

    a, *bs = (
        read(tensors[f"{PREFIX}{adapted.name}.{key}"], adapted.is_shared(key, lora))
        for key in ("a", *(b_name(part) for part, _ in adapted.parts))
    )
    products = [b @ own for b, own in zip(bs, a.chunk(len(bs)), strict=True)]
    if adapted.heads is not None:
        rows = QKV("", ()).pieces(sum(rows for _, rows in adapted.parts), adapted.heads)
        products = [products[piece.source][piece.start : piece.start + piece.rows] for piece in rows]
    summed = read(weight, shared=False) + lora.scale * torch.cat(products)
    return summed.to(getattr(torch, weight.dtype))
