"""What a modality has of its own between its pictures and the language model: a tower, a projector, or both.

The record of `data.modalities` says so; everything else of it is how a file becomes a picture. A modality without either goes
through the model's own tower and projector, and is no branch.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.config import ConfigError, DataConfig, Modality
from megatron_moellava.towers import TOWERS, Tower, get_tower, tower_fields, tower_of_section

FREE = ("name", "source")  # of a tower's fields: no part of what its weights mean
PREFIX = "modality_"  # of a branch's module, and so of its tensors: modality_{name}.tower., modality_{name}.projector.


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """The way of one modality's pictures, where it is not that of plain ones."""

    modality: str  # its name
    tower: Tower | None = None  # None: the model's
    own_projector: bool = False

    @property
    def prefix(self) -> str:
        """Of its tensors."""
        return f"{PREFIX}{self.modality}."

    def seen_by(self, tower: Tower) -> Tower:
        """The tower of its pictures, in a model of this one."""
        return self.tower or tower

    def to_json(self) -> dict:
        """Its entry in the `model` section of run.json."""
        fields = tower_fields(self.tower) if self.tower else None
        return {"modality": self.modality, "tower_fields": fields, "own_projector": self.own_projector}


def branches_of_data(data: DataConfig) -> tuple[Branch, ...]:
    """Of the records of `data.modalities`, in their order; those that are not apart have none. ConfigError as `own_tower`."""
    return tuple(
        Branch(modality=item.name, tower=own_tower(item), own_projector=item.projector == "own")
        for item in data.modalities
        if item.is_apart
    )


def branches_of_section(section: dict) -> tuple[Branch, ...]:
    """Of the `model` section of a run.json. Raises CheckpointError for fields that do not describe a tower."""
    return tuple(
        Branch(
            modality=item["modality"],
            tower=tower_of_section({"tower_fields": item["tower_fields"]}),
            own_projector=item["own_projector"],
        )
        for item in section.get("branches", ())
    )


def tower_for(modality: Modality | None, tower: Tower) -> Tower:
    """The tower of a picture: that of its modality, if it has one, or the model's, which is `tower`."""
    return (modality and own_tower(modality)) or tower


def own_tower(modality: Modality) -> Tower | None:
    """A record's own tower: by name, of a folder's `config.json`, or the one that a Megatron checkpoint has for this modality
    (else the checkpoint's own); None: it has none. ConfigError names what is near."""
    return _named(modality.tower, modality.name) if modality.tower else None


@functools.lru_cache(maxsize=64)  # asked for with every picture
def _named(name: str, modality: str) -> Tower:
    described = None if name in TOWERS else described_model(Path(name).expanduser())
    of_checkpoint = next(
        (branch for branch in branches_of_section(described or {}) if branch.modality == modality), None
    )
    if of_checkpoint is not None and of_checkpoint.tower is not None:
        return of_checkpoint.tower
    try:
        return get_tower(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.tower", f"data.modalities {modality}: tower", 1)) from None


def names_of(branch: Branch, checkpoint: Path) -> dict[str, str]:
    """The fields of a record that say what a checkpoint has for its modality: a known tower by name, any other by the
    checkpoint itself, which has every field."""
    projector = {"projector": "own"} if branch.own_projector else {}
    if branch.tower is None:
        return projector
    return projector | {
        "tower": branch.tower.name if TOWERS.get(branch.tower.name) == branch.tower else str(checkpoint)
    }


def completed(records: object, section: dict, checkpoint: Path) -> object:
    """Records of `data.modalities` as a YAML file has them, with the towers and projectors of a checkpoint's `model` section
    where they name none, or a folder that is gone. What is no list of records stays as it is."""
    known = {branch.modality: names_of(branch, checkpoint) for branch in branches_of_section(section)}
    if not known or not isinstance(records, list | tuple):
        return records
    return [
        _completed(item, known.get(str(item.get("name")), {})) if isinstance(item, dict) else item for item in records
    ]


def _completed(record: dict, of_checkpoint: dict[str, str]) -> dict:
    given = {name: value for name, value in record.items() if name != "tower" or not _is_gone(value)}
    return of_checkpoint | given


def _is_gone(tower: object) -> bool:
    return not tower or (isinstance(tower, str) and "/" in tower and not Path(tower).expanduser().exists())


def branch_problems(stored: dict, branches: Sequence[Branch]) -> Iterator[str]:
    """What a checkpoint's `model` section and a run contradict each other in, with the way out."""
    there, here = {branch.modality: branch for branch in branches_of_section(stored)}, {b.modality: b for b in branches}
    for name, branch in here.items():
        if name not in there:
            yield (
                f"has no {_what(branch)} of its own for {name}, which data.modalities asks for; make that first: moellava "
                f"convert add-modality --modality {name}"
            )
        elif differing := ", ".join(_differences(found := there[name], branch)):
            yield (
                f"has {_what(found)} of its own for {name}, and the record of data.modalities is another one ({differing}); "
                "leave `tower` and `projector` out of it"
            )
    for name in sorted(there.keys() - here.keys()):
        yield (
            f"has {_what(there[name])} of its own for {name}, and data.modalities has no such record; add it, without `tower` "
            "and `projector`, which the checkpoint brings along"
        )


def _what(branch: Branch) -> str:
    parts = ["tower"] * (branch.tower is not None) + ["projector"] * branch.own_projector
    return " and ".join(parts)


def _differences(there: Branch, here: Branch) -> Iterator[str]:
    if there.own_projector != here.own_projector:
        yield f"projector {_kind(there)} there, {_kind(here)} here"
    old, new = (tower_fields(branch.tower) if branch.tower else {} for branch in (there, here))
    if bool(old) != bool(new):
        yield f"tower {old.get('name', 'shared')} there, {new.get('name', 'shared')} here"
        return
    for name in sorted(old.keys() | new.keys()):
        if name not in FREE and old.get(name) != new.get(name):
            yield f"tower.{name} {old.get(name)} there, {new.get(name)} here"


def _kind(branch: Branch) -> str:
    return "own" if branch.own_projector else "shared"
