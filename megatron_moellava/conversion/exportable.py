"""What a layout cannot hold, said before anything is written."""

from megatron_moellava.checkpoint.description import trained_with
from megatron_moellava.config import CheckpointError, ConfigError
from megatron_moellava.conversion import for_generation
from megatron_moellava.conversion.layout import (
    LANGUAGE_MODEL,
    LLAVA,
    ORIGINAL,
    TRANSFORMERS,
    VISION_TOWER,
)
from megatron_moellava.conversion.megatron_checkpoint import Checkpoint
from megatron_moellava.conversion.modality import check_no_branches
from megatron_moellava.costs.shapes import UNUSED, Model
from megatron_moellava.towers import Tower

GGUF = "gguf"
PARTS = (LANGUAGE_MODEL.name, VISION_TOWER.name, "projector")  # layouts of a part of the model


def check_exportable(source: Checkpoint, layout: str) -> None:
    """Raise ConfigError for what Megatron-Core can train and `layout` cannot hold."""
    moe, tower, backbone = source.model.moe, source.model.tower, source.model.backbone
    _check_modalities(trained_with(source.run), layout)
    if layout not in PARTS:
        check_no_branches(source.model, f"--layout {layout}")
    if tower and layout in (ORIGINAL.name, LLAVA.name, TRANSFORMERS.name):
        _check_tower(tower, layout)
    if moe and moe.expert_groups and layout not in (VISION_TOWER.name, "projector"):
        _check_groups(source.model, layout)
    if moe is None or layout in (TRANSFORMERS.name, VISION_TOWER.name, "projector", GGUF):
        return
    if backbone.hf.experts is not None:
        if layout == LANGUAGE_MODEL.name:
            return
        raise ConfigError(
            f"--layout {layout}: that code has no {backbone.hf.family}, whose own models have experts; export --layout "
            "transformers, or language-model"
        )
    fields = ("moe_router_enable_expert_bias", "moe_shared_expert_intermediate_size")
    beyond = [f"moe.{name}={getattr(moe, name)}" for name in fields if getattr(moe, name)]
    if beyond:
        raise ConfigError(f"{', '.join(beyond)}: --layout {layout} cannot say it; export --layout transformers")


def _check_modalities(trained: dict[str, dict], layout: str) -> None:
    """No processor of others shows levels as a record of `data.modalities` does."""
    names = for_generation.levels_of_others(trained)
    if names and layout in (TRANSFORMERS.name, GGUF):
        raise ConfigError(
            f"data.modalities: --layout {layout} has no pictures of {names}, and its processor would show their levels "
            "otherwise than this model was trained with; export --layout original, which says so in its config.json, or "
            "--layout language-model, tower and projector"
        )


def _check_groups(model: Model, layout: str) -> None:
    """Experts by modality are in no published class, and nothing without pictures knows which token is of one."""
    tower = model.tower
    stock = model.backbone.hf.experts is not None or (tower is not None and (tower.native or tower.newline))
    if layout != TRANSFORMERS.name or stock:
        raise ConfigError(
            f"moe.expert_groups: --layout {layout} of this model has no experts by modality, and without them it would be "
            "another model; "
            + (
                "no layout has"
                if stock
                else "export --layout transformers, whose modelling file beside the weights has them"
            )
        )


def _check_tower(tower: Tower, layout: str) -> None:
    """Native resolution is LFM2-VL's alone, and a pixel shuffle without it nobody's."""
    if tower.tiles.single_only and layout == LLAVA.name:
        raise ConfigError(f"model.tower={tower.name}: --layout llava is LLaVA-NeXT's; export --layout transformers")
    if tower.newline and layout == ORIGINAL.name:
        raise ConfigError(
            f"model.tower={tower.name}: MoE-LLaVA's code puts no tiles together; export --layout transformers"
        )
    if tower.native and layout != TRANSFORMERS.name:
        raise ConfigError(
            f"model.tower={tower.name}: --layout {layout} has no native resolution; export --layout transformers"
        )
    if tower.takes_videos:
        raise ConfigError(
            f"model.tower={tower.name}: --layout {layout} has no tower that attends across the frames of a video; export "
            "--layout language-model, tower and projector"
        )
    if tower.shuffle > 1 and not tower.native:
        raise ConfigError(
            f"model.tower={tower.name}: --layout {layout} has no projector {tower.projector!r}; export --layout "
            "language-model, tower and projector"
        )


def check_has_unused(source: Checkpoint) -> None:
    """Raise ConfigError without a tower, CheckpointError without the tensors of a published one that training leaves out."""
    if source.model.tower is None:
        raise ConfigError(f"{source.folder} has no vision tower; export it with --layout language-model")
    if source.model.tower.native:  # its features need every layer, and a pooling head may be missing
        return
    if not any(name.startswith(UNUSED) for name in source.tensors):
        raise CheckpointError(
            f"{source.folder} lacks the tower's last layer, which training does not need; give --tower the tower's folder"
        )
