"""The averaged weights that a run has kept beside its own (`optimizer.ema_decay`) -> a checkpoint of their own."""

from collections.abc import Callable
from pathlib import Path

from megatron_moellava.checkpoint.description import converted
from megatron_moellava.checkpoint.folders import AVERAGES
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint, write_checkpoint
from megatron_moellava.conversion.recipes import Part, Recipe, identity
from megatron_moellava.conversion.writers import Progress


def take_average(
    checkpoint: Path,
    *,
    save: Path,
    verify: bool = True,
    progress: Progress = lambda count: None,
    begin: Callable[[int], object] = lambda total: None,
) -> dict:
    """Write SAVE/iter_0000000: the model of a run, or its adapter, with the averages in the place of what was trained.

    Raises CheckpointError where the run has averaged nothing.
    """
    source = open_checkpoint(checkpoint, verify=verify, adapter=True)
    averages = open_checkpoint(checkpoint, verified=True, adapter=True, stored_as=AVERAGES).tensors
    if not averages:
        raise CheckpointError(
            f"{source.folder} has no averaged weights: its run had no optimizer.ema_decay, or it is a conversion; train with "
            "optimizer.ema_decay, e.g. 0.999"
        )
    tensors = source.tensors | {f"{AVERAGES}{name}": tensor for name, tensor in averages.items()}
    recipes = [
        Recipe(name, tensor.shape, tensor.dtype, (Part(f"{AVERAGES}{name}", 0, tensor.numel),))
        if name in averages
        else identity(name, tensor)
        for name, tensor in source.tensors.items()
    ]
    begin(sum(recipe.nbytes for recipe in recipes))
    name = f"{source.folder.parent.name}/{source.folder.name}"
    provenance = converted(source.run, "average", source=name, source_seal=source.run.checksum)
    folder = write_checkpoint(
        save,
        source.model,
        recipes,
        tensors,
        stage=source.run.stage or 0,
        provenance=provenance,
        progress=progress,
        adapter=source.run.adapter,
    )
    return {"folder": str(folder), "tensors": len(recipes), "averaged": len(averages)}
