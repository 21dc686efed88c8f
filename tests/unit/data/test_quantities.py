"""From levels of depth and thermal files to three channels, by the record alone."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.config import Channel, Modality
from megatron_moellava.data.bad_sample import BadSample
from megatron_moellava.data.images import to_rgb
from megatron_moellava.data.quantities import (
    MODALITY,
    check_picture,
    kinds_of,
    levels_of,
    open_picture,
    shown,
)
from tests.helpers.modalities import DEPTH, THERMAL
from tests.helpers.tiffs import raw_tiff, twelve_bits

INVERSE = {"linear": lambda place: place, "log": math.exp, "reciprocal": lambda place: 1 / place}
FORTH = {"linear": lambda quantity: quantity, "log": math.log, "reciprocal": lambda quantity: 1 / quantity}


def file_of(levels: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (levels if isinstance(levels, Image.Image) else Image.fromarray(levels)).save(buffer, kind, **options)
    return buffer.getvalue()


def drawn_record(draw: np.random.Generator) -> Modality:
    curve = str(draw.choice(list(FORTH)))
    black, white = (float(value) for value in draw.uniform(0.2, 20, 2))
    scale = float(draw.uniform(0.0001, 0.002))
    return Modality(
        name="depth", levels="uint16", scale=scale, offset=float(draw.uniform(-1, 1)), missing=(0, 7), missing_shown=9,
        channels=(Channel(black=black, white=white, curve=curve),),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_every_level_is_shown_where_the_record_says_and_can_be_read_back_to_half_a_step(seed):
    draw = np.random.default_rng(seed)
    record = drawn_record(draw)
    (channel,) = record.channels
    levels = draw.permutation(1 << 16)[:400]
    found = shown(levels, record)
    assert (found == found[:, :1]).all(), "one channel stands for three"
    low, high = sorted((channel.black, channel.white))
    start, end = FORTH[channel.curve](channel.black), FORTH[channel.curve](channel.white)
    for level, value in zip(levels.tolist(), found[:, 0].tolist(), strict=True):
        quantity = level * record.scale + record.offset
        if level in record.missing:
            assert value == record.missing_shown
        elif not low < quantity < high:
            assert value == (0 if (quantity <= low) == (channel.black == low) else 255)
        else:
            back = [INVERSE[channel.curve](start + (value + half) / 255 * (end - start)) for half in (-0.5, 0.5)]
            assert min(back) - 1e-9 <= quantity <= max(back) + 1e-9


def test_a_file_is_shown_as_its_levels_are():
    levels = np.random.default_rng(1).integers(0, 9000, (40, 30)).astype(np.uint16)
    picture, notes = open_picture(file_of(levels), DEPTH, "x")
    assert (picture.mode, picture.size, notes) == ("RGB", (30, 40), ())
    assert picture.info[MODALITY] == "depth"
    np.testing.assert_array_equal(np.asarray(picture), shown(levels, DEPTH))
    # 8 m is black, 0.5 m white, 0.94 m in the middle of the inverse depths; 0 is not measured
    assert shown(np.array([8000, 500, 941, 0, 9000, 1]), DEPTH)[:, 1].tolist() == [0, 255, 128, 0, 0, 255]


def test_what_else_a_picture_holds_changes_nothing():
    levels = np.full((8, 8), 2000, dtype=np.uint16)
    alone, _ = open_picture(file_of(levels), DEPTH, "x")
    levels[0, 0] = 65535
    beside, _ = open_picture(file_of(levels), DEPTH, "x")
    assert alone.getpixel((5, 5)) == beside.getpixel((5, 5)) == (51, 51, 51)


def test_radiometric_floats_with_gaps():
    kelvin = np.array([[253.15, 393.15, 323.15], [np.nan, np.inf, 0]], dtype=np.float32) * 100
    record = replace(THERMAL, missing_shown=200)
    picture, _ = open_picture(file_of(kelvin, "TIFF"), record, "x")
    assert np.asarray(picture)[..., 2].tolist() == [[0, 255, 128], [200, 255, 0]]


@pytest.mark.parametrize("levels", ["uint8", "uint12", "int16", "uint16", "int32", "uint32"])
def test_every_type_of_level(levels):
    """Channels of their own: the lower half of the range, the upper half, and all of it inverted."""
    kind = {"uint12": np.uint16}.get(levels, levels)
    low, high = (0, 4095) if levels == "uint12" else (np.iinfo(levels).min, np.iinfo(levels).max)
    middle = (low + high + 1) // 2
    channels = (Channel(black=low, white=middle), Channel(black=middle, white=high), Channel(black=high, white=low))
    record = Modality(name="radar", levels=levels, channels=channels)
    picture, _ = open_picture(tiff_of(np.array([[low, middle, high, high]], dtype=kind), levels), record, "x")
    assert np.asarray(picture)[0, :3].tolist() == [[0, 0, 255], [255, 0, 127], [255, 255, 0]]


def tiff_of(stored: np.ndarray, levels: str) -> bytes:
    if levels == "uint12":
        return twelve_bits(stored)
    if levels == "uint32":
        return raw_tiff(stored.tobytes(), stored.shape, 32, 1)
    if levels == "int16":
        return file_of(stored.view(np.uint16), "TIFF", tiffinfo={339: 2})
    return file_of(stored, "TIFF")


def test_the_camera_that_was_held_otherwise():
    levels = np.arange(12, dtype=np.uint16).reshape(3, 4) * 700 + 1
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture, notes = open_picture(file_of(levels, exif=exif), DEPTH, "x")
    np.testing.assert_array_equal(np.asarray(picture), np.rot90(shown(levels, DEPTH), k=-1))
    assert notes == ("EXIF rotation applied",)


def test_colours_are_read_as_plain_pictures_are():
    record = Modality(name="falsecolour", levels="colours")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 4), dtype=np.uint8))
    picture, notes = open_picture(file_of(image), record, "x")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(to_rgb(image)[0]))
    assert (notes, picture.info[MODALITY]) == (("alpha dropped",), "falsecolour")


WRONG = {
    "uint8": (np.zeros((4, 4), np.uint8), {}, "holds uint8, and 'depth' of data.modalities declares levels=uint16"),
    "float": (np.zeros((4, 4), np.float32), {"kind": "TIFF"}, "holds float"),
    "colours": (np.zeros((4, 4, 3), np.uint8), {}, "holds pixels of the mode RGB"),
    "bits": (Image.new("L", (4, 4)), {"bits": 4}, "holds "),
    "white is 0": (np.zeros((4, 4), np.uint16), {"kind": "TIFF", "tiffinfo": {262: 0}}, "whose 0 is white"),
    "type": (
        np.zeros((4, 4), np.uint8),
        {"kind": "JPEG"},
        "is a JPEG file, and 'depth' of data.modalities takes PNG, TIFF",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("check", [check_picture, open_picture])
def test_what_the_record_does_not_declare_is_refused(name, check):
    levels, options, message = WRONG[name]
    with pytest.raises(BadSample, match=message) as found:
        check(file_of(levels, **options), DEPTH, "rows.json row 3")
    assert str(found.value).startswith("rows.json row 3: ")


def test_a_file_that_is_no_picture_and_one_that_is_cut_off():
    whole = file_of(np.random.default_rng(0).integers(0, 9000, (60, 60)).astype(np.uint16))
    for data in (b"nothing", whole[: len(whole) // 2]):
        with pytest.raises(BadSample, match="x: cannot be decoded"):
            open_picture(data, DEPTH, "x")


def test_levels_are_named_by_the_file_and_not_by_its_mode():
    with Image.open(io.BytesIO(file_of(np.zeros((2, 2), np.uint16)))) as image:
        assert levels_of(image) == "uint16"


def test_only_other_pictures_are_named():
    assert kinds_of(["image", "image"]) == () == kinds_of([])
    assert kinds_of(["image", "depth"]) == ("image", "depth")
