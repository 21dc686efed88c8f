"""Pictures whose levels are quantities (a depth, a temperature) -> three channels of 8 bits, by the record of their modality.

A level becomes a quantity (`scale`, `offset`), the quantity a place between `black` and `white` of each channel, the place a
level of 0 to 255. The record (`config.Modality`) alone says how, never what a picture holds: the same level is shown alike in
every picture. From there on such a picture goes the way of all others.
"""

import functools
import re
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageOps

from megatron_moellava.config import Channel, Levels, Modality
from megatron_moellava.data import images
from megatron_moellava.data.bad_sample import BadSample

MODALITY = "moellava_modality"  # in the `info` of a picture: the name of its modality, unless it is a plain one
PLAIN = "image"  # what a plain picture is called where others have the name of their modality
COLOURS: Levels = "colours"  # Modality.levels of what is read as plain pictures are
GREY_FORMATS = ("PNG", "TIFF")  # of files of grey levels, where the record names none
TABLE_BITS = 16  # levels of so many bits are looked up
CURVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda quantity: quantity,
    "log": np.log,
    "reciprocal": lambda quantity: 1 / quantity,
}


def open_picture(data: bytes | str, modality: Modality, where: str) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB picture and notes, from bytes or a path. Raises BadSample where the file is not what the record declares."""
    with images.opened(data, where, modality.name) as image:
        _check(image, modality, where)
        if modality.levels == COLOURS:
            picture, notes = images.to_rgb(image)
        else:
            picture, notes = _to_rgb(image, modality)
    picture.info[MODALITY] = modality.name
    return picture, notes


def check_picture(data: bytes | str, modality: Modality, where: str) -> None:
    """From the file's header alone: raises BadSample where it is not what the record declares."""
    with images.opened(data, where, modality.name) as image:
        _check(image, modality, where)


def kinds_of(names: Iterable[str]) -> tuple[str, ...]:
    """The names of pictures' modalities, or nothing where all are `PLAIN`."""
    found = tuple(names)
    return found if {*found} - {PLAIN} else ()


def formats_of(modality: Modality) -> tuple[str, ...]:
    """Pillow's names of the file types that its pictures may have; none: all."""
    return modality.formats or (() if modality.levels == COLOURS else GREY_FORMATS)


def shown(levels: np.ndarray, modality: Modality) -> np.ndarray:
    """uint8 [..., 3]: what levels of a file (whole numbers, or float32) become.

    >>> shown(np.array([0, 1000, 3000]), Modality(name="depth", levels="uint16", scale=0.001, missing=(0,), missing_shown=255,
    ...     channels=(Channel(black=1, white=5),)))[:, 0]
    array([255,   0, 128], dtype=uint8)
    """
    kind = np.float32 if levels.dtype.kind == "f" else np.float64
    is_missing = np.isnan(levels) | np.isin(levels.astype(kind), np.asarray(modality.missing, dtype=kind))
    quantity = levels.astype(np.float64) * modality.scale + modality.offset
    channels = modality.channels * (3 // len(modality.channels))
    planes = {channel: _plane(np.where(is_missing, channel.black, quantity), channel) for channel in channels}
    pixels = np.stack([planes[channel] for channel in channels], axis=-1)
    pixels[is_missing] = modality.missing_shown
    return pixels


def _plane(quantity: np.ndarray, channel: Channel) -> np.ndarray:
    curve, ends = CURVES[channel.curve], np.array([channel.black, channel.white], dtype=np.float64)
    black, white = curve(ends)
    place = (curve(quantity.clip(ends.min(), ends.max())) - black) / (white - black)
    return np.rint(255 * place).astype(np.uint8)


@functools.lru_cache(maxsize=32)
def _table(modality: Modality, bits: int, signed: bool) -> np.ndarray:
    """`shown` of every level that such a file can hold, from the lowest on."""
    lowest = -(1 << (bits - 1)) if signed else 0
    return shown(np.arange(lowest, lowest + (1 << bits)), modality)


def _to_rgb(image: Image.Image, modality: Modality) -> tuple[Image.Image, tuple[str, ...]]:
    notes = [images.FIRST_FRAME] if images.has_more_frames(image) else []
    turned = image.getexif().get(images.ORIENTATION, 1)
    if images.is_deep(image):
        levels, (bits, signed) = images.deep_levels(image), images.grey_bits(image)
    else:
        levels, (bits, signed) = np.asarray(image), (8, False)
    if levels.dtype.kind == "f" or bits > TABLE_BITS:
        pixels_HWC = shown(levels, modality)
    else:
        table = _table(modality, bits, signed)
        pixels_HWC = table[levels.astype(np.int64) + (len(table) // 2 if signed else 0)]
    picture = Image.fromarray(pixels_HWC)
    if turned in range(2, 9):
        picture.getexif()[images.ORIENTATION] = turned
        picture = ImageOps.exif_transpose(picture)
        notes.append("EXIF rotation applied")
    return picture, tuple(notes)


def _check(image: Image.Image, modality: Modality, where: str) -> None:
    allowed = formats_of(modality)
    if allowed and image.format not in allowed:
        raise BadSample(
            "unexpected file type",
            f"{where}: is a {image.format} file, and {modality.name!r} of data.modalities takes {', '.join(allowed)}; convert "
            "it, or name the type in its `formats`",
        )
    if modality.levels != COLOURS and (found := levels_of(image)) != modality.levels:
        raise BadSample(
            "unexpected levels",
            f"{where}: holds {found}, and {modality.name!r} of data.modalities declares levels={modality.levels}; declare what "
            "the files hold, or convert them to one type",
        )


def levels_of(image: Image.Image) -> str:
    """What a picture that has just been opened holds, as `Modality.levels` says it; for what it does not know, in words."""
    if image.mode == "F":
        return "float"
    tiles = getattr(image, "tile", ())
    packed = re.search(r"\bL;(\w+)", str(tiles[0][3])) if tiles else None
    if images.white_is_zero(image):
        return "levels whose 0 is white"
    if image.mode == "L":
        return f"levels of {packed[1]} bits" if packed else "uint8"
    if not images.is_deep(image):
        return f"pixels of the mode {image.mode}"
    bits, signed = images.grey_bits(image)
    return f"{'' if signed else 'u'}int{bits}"
