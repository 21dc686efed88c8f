"""Vision towers as data: one file per family, `TOWERS` by name, or any size of a family from its `config.json`.

`NAME@RULE` is a tower with another rule of what becomes of its features, for folders too: `RULES` has them.
"""

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.config import CheckpointError, ConfigError, RunConfig
from megatron_moellava.towers import clip, languagebind_image, languagebind_video, siglip, siglip2
from megatron_moellava.towers.from_config import tower_fields, tower_from_fields, tower_from_hf_folder
from megatron_moellava.towers.pooling import POOLINGS, Pooling
from megatron_moellava.towers.projector import PROJECTORS, ProjectorKind
from megatron_moellava.towers.tiling import TILINGS, Tiling
from megatron_moellava.towers.tower import Tower, TowerHuggingFace

__all__ = [
    "FAMILIES",
    "POOLINGS",
    "PROJECTORS",
    "RULES",
    "TILINGS",
    "TOWERS",
    "Pooling",
    "ProjectorKind",
    "Tiling",
    "Tower",
    "TowerHuggingFace",
    "get_tower",
    "tower_fields",
    "tower_from_fields",
    "tower_from_hf_folder",
    "tower_of_run",
    "tower_of_section",
    "without_rule",
]

FAMILIES = (clip, siglip, siglip2, languagebind_image, languagebind_video)
TOWERS: dict[str, Tower] = {size.name: size for family in FAMILIES for size in family.SIZES}
ORIGINAL = "@original"
RULES: dict[str, dict[str, Any]] = {
    ORIGINAL: {"drop_first_feature": True},  # MoE-LLaVA's: the first feature is always dropped
    "@newline": {"newline": True},  # LLaVA-NeXT's merge of tiles, "spatial_unpad" with a learned end of line
    "@onevision": {"newline": True, "tiling": "onevision"},  # LLaVA-OneVision's: more grids, "anyres_max_9"
    "@pixel_shuffle": {"projector": "pixel_shuffle"},  # the features of 2 x 2 patches are one visual token
}


def without_rule(name: str) -> str:
    """`NAME` of `NAME@original@pixel_shuffle`; other names as they are."""
    while rule := next((suffix for suffix in RULES if name.endswith(suffix)), ""):
        name = name.removesuffix(rule)
    return name


def checked(tower: Tower) -> Tower:
    """The tower itself. ConfigError where a rule and the tower do not belong together."""
    odd = tower.position_side % tower.shuffle if not tower.native else 0
    if odd or (tower.shuffle > 1 and tower.drop_first_feature != tower.class_token):
        side = tower.position_side
        raise ConfigError(
            f"model.tower={tower.name}: the projector {tower.projector!r} needs features in a grid whose sides are "
            f"multiples of {tower.shuffle}, and this tower has {side} x {side} patches"
            f"{' less the first' if tower.drop_first_feature and not tower.class_token else ''}; use another tower, such as "
            "siglip2-so400m-patch16-512@pixel_shuffle, or none of this rule"
        )
    if tower.newline and (tower.native or tower.num_features != tower.feature_side**2):
        raise ConfigError(
            f"model.tower={tower.name}: @newline and @onevision put tiles together line by line, and this tower has "
            f"{'no tiles' if tower.native else 'features that are no square'}; use it with a tower such as "
            "clip-vit-large-patch14-336 or siglip2-so400m-patch16-512"
        )
    if tower.newline and tower.takes_videos:
        raise ConfigError(f"model.tower={tower.name}: frames of a video are not cut into tiles; drop the rule")
    if tower.native and tower.drop_first_feature:
        raise ConfigError(
            f"model.tower={tower.name}: a tower at native resolution keeps all of its features; drop {ORIGINAL}"
        )
    return tower


def get_tower(name: str) -> Tower:
    """A tower by name, of a folder's `config.json`, or of a Megatron checkpoint. ConfigError lists nearest names."""
    for suffix, fields in RULES.items():
        if name.endswith(suffix):
            return checked(replace(get_tower(name.removesuffix(suffix)), name=name, **fields))
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


def tower_of_run(run: RunConfig) -> Tower:
    """The tower that a run names, with the budget that its data have for one picture."""
    tower = get_tower(run.model.tower)
    budget = run.data.max_image_tokens or 0
    if not tower.native or budget < 1:
        return tower
    return replace(tower, max_num_patches=budget * tower.shuffle**2)


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
