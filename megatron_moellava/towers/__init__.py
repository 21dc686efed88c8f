"""Vision towers as data: one file per family, `TOWERS` by name, or any size of a family from its `config.json`.

`NAME@original` is a tower with MoE-LLaVA's feature rule (the first feature is always dropped), for folders too.
"""

import difflib
from dataclasses import replace
from pathlib import Path

from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.towers import clip, siglip
from megatron_moellava.towers.from_config import tower_fields, tower_from_fields, tower_from_hf_folder
from megatron_moellava.towers.tower import Tower, TowerHuggingFace

__all__ = [
    "FAMILIES",
    "TOWERS",
    "Tower",
    "TowerHuggingFace",
    "get_tower",
    "tower_fields",
    "tower_from_fields",
    "tower_from_hf_folder",
    "tower_of_section",
    "without_rule",
]

FAMILIES = (clip, siglip)
TOWERS: dict[str, Tower] = {size.name: size for family in FAMILIES for size in family.SIZES}
ORIGINAL = "@original"


def without_rule(name: str) -> str:
    """`NAME` of `NAME@original`; other names as they are."""
    return name.removesuffix(ORIGINAL)


def get_tower(name: str) -> Tower:
    """A tower by name, of a folder's `config.json`, or of a Megatron checkpoint. ConfigError lists nearest names."""
    if name.endswith(ORIGINAL):
        return replace(get_tower(without_rule(name)), name=name, drop_first_feature=True)
    if name in TOWERS:
        return TOWERS[name]
    path = Path(name).expanduser()
    if path.exists():
        described = described_model(path)
        if described:
            tower = tower_of_section(described)
            if tower is None:
                raise ConfigError(f"model.tower={name}: the checkpoint is a language model alone; name a tower")
            return tower
        return tower_from_hf_folder(path, FAMILIES, name=name)
    near = difflib.get_close_matches(name, TOWERS, n=3, cutoff=0.3) or sorted(TOWERS)
    raise ConfigError(
        f"model.tower={name!r} is neither a known tower nor a folder with a config.json; "
        f"nearest names: {', '.join(near)}"
    )


def tower_of_section(section: dict) -> Tower | None:
    """The tower of the `model` section of a run.json: by its fields, or by name where there are none; None: it has none.

    Raises CheckpointError for fields that do not describe a tower.
    """
    if section.get("tower_fields"):
        try:
            return tower_from_fields(section["tower_fields"], FAMILIES)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"run.json: model.tower_fields do not describe a tower: {error}") from None
    return get_tower(section["tower"]) if section.get("tower") else None
