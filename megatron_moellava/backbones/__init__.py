"""Language models as data: one file per family, `BACKBONES` by name, or any size of a family from its `config.json`."""

import difflib
from pathlib import Path

from megatron_moellava.backbones import (
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    dots1,
    llama,
    minicpm,
    mistral,
    mixtral,
    olmoe,
    phi2,
    qwen,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    stablelm2,
)
from megatron_moellava.backbones.backbone import Backbone, HuggingFace, LatentAttention, RopeScaling, YarnScaling
from megatron_moellava.backbones.from_config import (
    backbone_fields,
    backbone_from_fields,
    backbone_from_hf_config,
)
from megatron_moellava.checkpoint.description import described_model
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.hf_config import read_json

__all__ = [
    "BACKBONES",
    "FAMILIES",
    "Backbone",
    "HuggingFace",
    "LatentAttention",
    "RopeScaling",
    "YarnScaling",
    "backbone_fields",
    "backbone_from_fields",
    "backbone_from_hf_config",
    "backbone_of_section",
    "get_backbone",
]

FAMILIES = (
    llama,
    mistral,
    phi2,
    stablelm2,
    qwen,
    qwen2,
    qwen3,
    minicpm,
    # with experts of their own
    mixtral,
    qwen2_moe,
    qwen3_moe,
    olmoe,
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    dots1,
)
BACKBONES: dict[str, Backbone] = {size.name: size for family in FAMILIES for size in family.SIZES}


def get_backbone(name: str) -> Backbone:
    """A backbone by name, or of the size that a folder's `config.json` says, or that a Megatron checkpoint holds.

    Raises ConfigError with the nearest names, or with every key of the config that this program does not support.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    path = Path(name).expanduser()
    if path.exists():
        described = described_model(path)
        if described:
            return backbone_of_section(described)
        config = read_json(path)
        return backbone_from_hf_config(config.get("text_config") or config, FAMILIES, name=name)
    near = difflib.get_close_matches(name, BACKBONES, n=3, cutoff=0.3) or sorted(BACKBONES)
    raise ConfigError(
        f"model.backbone={name!r} is neither a known backbone nor a folder with a config.json; "
        f"nearest names: {', '.join(near)}"
    )


def backbone_of_section(section: dict) -> Backbone:
    """The backbone of the `model` section of a run.json: by its fields, or by name where there are none.

    Raises CheckpointError where neither is there, or the fields describe none.
    """
    if section.get("backbone_fields"):
        try:
            return backbone_from_fields(section["backbone_fields"], FAMILIES)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"run.json: model.backbone_fields do not describe a backbone: {error}") from None
    if not section.get("backbone") or not isinstance(section["backbone"], str):
        raise CheckpointError("run.json: model.backbone is missing; the checkpoint does not say its model")
    return get_backbone(section["backbone"])
