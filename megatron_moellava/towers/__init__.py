"""Vision towers as data: one file per family, `TOWERS` by name, or any size of a family from its `config.json`.

`NAME@original` is a tower with MoE-LLaVA's feature rule (the first feature is always dropped), for folders too.
"""

import difflib
from dataclasses import replace
from pathlib import Path

from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.config import ConfigError
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
]

FAMILIES = (clip, siglip)
TOWERS: dict[str, Tower] = {size.name: size for family in FAMILIES for size in family.SIZES}
ORIGINAL = "@original"


def get_tower(name: str) -> Tower:
    """A tower by name, of a folder's `config.json`, or of a Megatron checkpoint. ConfigError lists nearest names."""
    if name.endswith(ORIGINAL):
        return replace(get_tower(name.removesuffix(ORIGINAL)), name=name, drop_first_feature=True)
    if name in TOWERS:
        return TOWERS[name]
    path = Path(name)
    if path.exists():
        described = described_model(path)
        if described:
            return tower_from_fields(described["tower_fields"], FAMILIES)
        return tower_from_hf_folder(path, FAMILIES, name=name)
    near = difflib.get_close_matches(name, TOWERS, n=3, cutoff=0.3) or sorted(TOWERS)
    raise ConfigError(
        f"model.tower={name!r} is neither a known tower nor a folder with a config.json; "
        f"nearest names: {', '.join(near)}"
    )
