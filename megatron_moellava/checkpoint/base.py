"""The base of an adapter checkpoint, which holds nothing but what was trained beside it: named by folder and by digest."""

from pathlib import Path

from megatron_moellava.checkpoint.description import RunDescription, read_description
from megatron_moellava.checkpoint.folders import complete_iterations, newest_checkpoint
from megatron_moellava.config import CheckpointError

SEAL_FIRST = "`moellava convert seal` gives it one"


def name_of_base(base: Path) -> dict:
    """What an adapter's run.json keeps of its base. CheckpointError for a base without a seal, or one that is an adapter."""
    description = read_description(base)
    if description.adapter is not None:
        raise CheckpointError(
            f"{base} is an adapter itself and cannot be a base; merge it first: moellava convert merge"
        )
    if description.checksum is None:
        raise CheckpointError(f"{base} has no seal by which an adapter could name it; {SEAL_FIRST}")
    return {"folder": str(base.absolute()), "seal": description.checksum}


def base_of(checkpoint: Path, description: RunDescription, given: str | Path | None = None) -> Path | None:
    """The iteration folder of the base of an adapter checkpoint; None where `checkpoint` is a whole model.

    `given`: where to look, instead of where the base lay when the adapter was trained. CheckpointError when it is not there
    or another one is.
    """
    if description.adapter is None:
        return None
    base = description.adapter["base"]
    place = Path(given or base["folder"])
    newest = newest_checkpoint(place)
    if newest is None:
        raise CheckpointError(
            f"{checkpoint} is an adapter of {base['folder']}, and {place} holds no checkpoint; say where it is: "
            "checkpoint.load in training, elsewhere join the two first: moellava convert merge --base"
        )
    for found in dict.fromkeys((newest, *complete_iterations(place))):
        if read_description(found).checksum == base["seal"]:
            return found
    raise CheckpointError(
        f"{checkpoint} is an adapter of {base['folder']} (seal {base['seal'][:12]}), and {newest} is another checkpoint "
        f"(seal {str(read_description(newest).checksum)[:12]}); give the base that it was trained on"
    )


def base_to_load(load: str | None) -> Path | None:
    """`checkpoint.load` of a run, where it is a base: an adapter there says itself where its base is."""
    found = newest_checkpoint(load) if load is not None else None
    return found if found is not None and read_description(found).adapter is None else None
