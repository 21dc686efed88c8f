"""The records of `data.modalities`: that they have names of their own, and that their numbers make a picture."""

import math
import re
from collections.abc import Iterator

from megatron_moellava.config import Channel, DataConfig, Modality, MoELlavaError
from megatron_moellava.data.quantities import COLOURS
from megatron_moellava.data.sample import TAKEN
from megatron_moellava.towers import Tower
from megatron_moellava.towers.branches import tower_for

NAME = re.compile(r"[a-z][a-z0-9_]*")
ONLY_OF_LEVELS = ("scale", "offset", "missing", "missing_shown", "channels")


def modality_problems(data: DataConfig) -> Iterator[str]:
    """What is wrong with each record: field, value, rule and way out."""
    names = [modality.name for modality in data.modalities]
    for index, modality in enumerate(data.modalities):
        where = f"data.modalities[{index}]"
        yield from _name_problems(where, modality, data, names)
        if modality.levels == COLOURS:
            yield from _colour_problems(where, modality)
        else:
            yield from _level_problems(where, modality)
    if data.modalities and data.sampler == "modality_length":
        yield (
            "data.sampler=modality_length tells rows with `image` from text alone, as the original; use data.sampler=shuffle "
            "beside data.modalities"
        )


def way_problems(data: DataConfig, tower: Tower) -> Iterator[str]:
    """Of towers and projectors of their own: whether they fit to `tower`, the model's."""
    for index, modality in enumerate(data.modalities):
        where = f"data.modalities[{index}]"
        if not modality.is_apart:
            continue
        try:
            own = tower_for(modality, tower)
        except MoELlavaError as error:
            yield str(error)
            continue
        if own.has_grids:
            yield f"{where}: {grids_apart(own)}"
        elif own.takes_videos and modality.tower:
            yield (
                f"{where}.tower={modality.tower}: it takes whole videos, and a modality has pictures; use it as model.tower, "
                "or languagebind-image-large-patch14 here"
            )
        elif modality.projector == "shared" and not projector_fits(own, tower):
            yield (
                f"{where}.tower={modality.tower}: its features are {own.projector_input_size} wide, and those of model.tower "
                f"{tower.projector_input_size}, so that they cannot share a projector; set {where}.projector to own"
            )


def grids_apart(tower: Tower) -> str:
    """What to say of a modality with a tower or a projector of its own whose pictures go through a tower that has grids."""
    return (
        f"what a modality has of its own takes pictures of one size, and {tower.name} gives pictures different numbers of "
        "visual tokens; give it a tower such as CLIP, SigLIP and SigLIP 2, beside which model.tower may be any"
    )


def projector_fits(tower: Tower, main: Tower) -> bool:
    """Whether features of `tower` can go through the projector that is made for those of `main`."""
    return (tower.projector_input_size, tower.projector) == (main.projector_input_size, main.projector)


def _name_problems(where: str, modality: Modality, data: DataConfig, names: list[str]) -> Iterator[str]:
    if not NAME.fullmatch(modality.name):
        yield f"{where}.name={modality.name!r} must be lower-case letters, digits and underscores, such as depth"
    elif modality.name in TAKEN or modality.name in data.ignore_keys:
        yield f"{where}.name={modality.name} is a key that rows have for something else; choose another name"
    elif names.count(modality.name) > 1:
        yield f"{where}.name={modality.name} is there twice; give each modality its own name"


def _colour_problems(where: str, modality: Modality) -> Iterator[str]:
    usual = Modality(name="", levels="colours")
    for name in ONLY_OF_LEVELS:
        if getattr(modality, name) != getattr(usual, name):
            yield f"{where}.{name}: colours are shown as they are; leave it unset, or say in `levels` what grey the files hold"


def _level_problems(where: str, modality: Modality) -> Iterator[str]:
    if len(modality.channels) not in (1, 3):
        yield (
            f"{where}.channels has {len(modality.channels)} entries; give one for all three channels, or three, such as "
            "[{black: 0.5, white: 10}]"
        )
    if modality.scale == 0 or not math.isfinite(modality.scale):
        yield f"{where}.scale={modality.scale} must be a number other than 0"
    if not math.isfinite(modality.offset):
        yield f"{where}.offset={modality.offset} must be a finite number"
    if not all(map(math.isfinite, modality.missing)):
        yield f"{where}.missing={list(modality.missing)} must be finite numbers; NaN is missing in any case"
    if not 0 <= modality.missing_shown <= 255:
        yield f"{where}.missing_shown={modality.missing_shown} must lie between 0 and 255"
    for index, channel in enumerate(modality.channels):
        yield from _channel_problems(f"{where}.channels[{index}]", channel)


def _channel_problems(where: str, channel: Channel) -> Iterator[str]:
    ends = f"{where}: black={channel.black:g}, white={channel.white:g}"
    if not math.isfinite(channel.black) or not math.isfinite(channel.white):
        yield f"{ends} must be finite numbers"
    elif channel.black == channel.white:
        yield f"{ends} must differ: they are the quantities that are shown as level 0 and as level 255"
    elif channel.curve != "linear" and min(channel.black, channel.white) <= 0:
        yield f"{ends} must both be positive with curve={channel.curve}; use curve=linear, or another range"
