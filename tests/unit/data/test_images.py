"""Images: equal to transformers' processors, and every odd or damaged file is mended, noted or refused."""

import base64
import io
import json
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from megatron_moellava.data import images, media
from megatron_moellava.data.pipeline import ADVICE
from megatron_moellava.data.sample import BadSample, ImageRef
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS
from tests.helpers.tiffs import raw_tiff, twelve_bits

TOWERS = {"clip": "openai/clip-tiny", "siglip": "google/siglip-tiny"}


def levels(pixels: np.ndarray, tower) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in (tower.image_mean, tower.image_std))
    return (pixels * std + mean) * 255


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("size", [(60, 40), (33, 71), (28, 28), (400, 301), (5, 9), (1, 1), (29, 300)])
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_pixels_equal_transformers_to_one_level(family, size, aspect):
    from transformers import AutoImageProcessor

    tower = get_tower(str(ASSETS / TOWERS[family]))
    processor = AutoImageProcessor.from_pretrained(str(ASSETS / TOWERS[family]), backend="pil")
    image = noise(*size)
    given = image
    if aspect == "pad":
        side = max(size)
        given = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        given.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    expected = np.asarray(processor(given, return_tensors="np")["pixel_values"][0])
    got = images.preprocess(image, tower, aspect)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(levels(got, tower) - levels(expected, tower)).max() <= 1


@pytest.mark.parametrize("family", TOWERS)
def test_pixels_equal_transformers_at_full_size(family):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    name, processor = {
        "clip": ("clip-vit-large-patch14-336", CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)),
        "siglip": ("siglip-so400m-patch14-384", SiglipImageProcessorPil(size={"height": 384, "width": 384})),
    }[family]
    tower, image = get_tower(name), noise(640, 427)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert np.abs(levels(images.preprocess(image, tower, "square"), tower) - levels(expected, tower)).max() <= 1


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("resample", [2, 3])
def test_pictures_are_interpolated_as_the_processor_says(family, resample, tmp_path):
    from transformers import AutoImageProcessor

    shutil.copytree(ASSETS / TOWERS[family], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"resample": resample}))
    tower, image = get_tower(str(tmp_path)), noise(90, 70)
    processor = AutoImageProcessor.from_pretrained(str(tmp_path), backend="pil")
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    assert np.abs(levels(images.preprocess(image, tower, "square"), tower) - levels(expected, tower)).max() <= 1


def test_padding_uses_the_mean_colour_and_centres():
    tower = get_tower("clip-vit-large-patch14-336")
    square = np.asarray(images.pad_to_square(noise(4, 9), tower.pad_color))
    assert square.shape == (9, 9, 3) and (square[:, :2] == (122, 116, 104)).all()
    assert (square[:, 2:6] == np.asarray(noise(4, 9))).all()


GREY = np.arange(1200, dtype=np.int64).reshape(30, 40) % 256  # levels of 8 bits, scaled up below


def deep(kind: str, brightest: int = 255) -> np.ndarray:
    return (GREY * brightest // 255).astype(kind)


def lab(image: Image.Image) -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


# name -> (image, container, notes, grey levels expected or None). Deep greys by their type: a dark picture stays dark.
MODES = {
    "CMYK": (noise(40, 30).convert("CMYK"), "JPEG", ("CMYK colours converted",), None),
    "palette": (noise(40, 30).convert("P"), "PNG", ("palette colours converted",), None),
    "palette and alpha": (noise(40, 30).convert("PA"), "TIFF", ("palette colours converted", "alpha dropped"), None),
    "grey": (Image.fromarray(deep("u1")), "PNG", (), GREY),
    "grey and alpha": (Image.fromarray(deep("u1")).convert("LA"), "PNG", ("alpha dropped",), GREY),
    "bilevel": (noise(40, 30).convert("1"), "PNG", (), None),
    "alpha": (noise(40, 30).convert("RGBA"), "PNG", ("alpha dropped",), None),
    "YCbCr": (noise(40, 30).convert("YCbCr"), "TIFF", ("YCbCr colours converted",), None),
    "LAB": (lab(noise(40, 30)), "TIFF", ("LAB colours converted",), None),
    "1-pixel": (noise(1, 1), "PNG", ("image of one pixel",), None),
    "16 bits, PNG": (Image.fromarray(deep("u2", 65535)), "PNG", ("16-bit image scaled",), GREY),
    "16 bits, TIFF": (Image.fromarray(deep("u2", 65535)), "TIFF", ("16-bit image scaled",), GREY),
    "16 bits, JPEG 2000": (Image.fromarray(deep("u2", 65535)), "JPEG2000", ("16-bit image scaled",), GREY),
    "16 bits, PGM": (Image.fromarray(deep("u2", 65535)), "PPM", ("16-bit image scaled",), GREY),
    "16 bits, dark, PNG": (Image.fromarray(deep("u2")), "PNG", ("16-bit image scaled",), GREY * 0),
    "16 bits, dark, TIFF": (Image.fromarray(deep("u2")), "TIFF", ("16-bit image scaled",), GREY * 0),
    "16 bits, dark, PGM": (Image.fromarray(deep("u2")), "PPM", ("16-bit image scaled",), GREY * 0),
    "32 bits": (Image.fromarray(deep("i4", 2**31 - 1)), "TIFF", ("32-bit image scaled",), GREY),
    "32 bits, dark": (Image.fromarray(deep("i4", 65535)), "TIFF", ("32-bit image scaled",), GREY * 0),
    "float": (Image.fromarray(deep("f4")), "TIFF", ("float levels clipped",), GREY),
    "float, dark": (Image.fromarray(deep("f4") / 255 / 2), "TIFF", ("float levels clipped",), GREY * 0),
    "12 bits": (twelve_bits(deep("u2", 4095)), "TIFF", ("12-bit image scaled",), GREY),
    "12 bits, dark": (twelve_bits(deep("u2", 15)), "TIFF", ("12-bit image scaled",), GREY * 0),
    "16 bits, white is 0": (
        raw_tiff(deep("<u2", 65535).tobytes(), (30, 40), 16, 0),
        "TIFF",
        ("16-bit image scaled",),
        255 - GREY,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_colour_mode_becomes_rgb_by_its_type(mode):
    image, kind, notes, levels = MODES[mode]
    opened, found = images.open_image(image if isinstance(image, bytes) else encoded(image, kind), "x")
    assert opened.mode == "RGB" and found == notes
    assert all(note in ADVICE for note in notes)
    if levels is not None:
        grey = np.asarray(opened).astype(int)
        assert (grey == grey[:, :, :1]).all() and np.abs(grey[:, :, 0] - levels).max() <= 1


def sixteen_bit_colours() -> bytes:
    """A PNG of 16-bit RGB, which Pillow reads and cannot write."""
    pixels = np.asarray(noise(40, 30)).astype(">u2") * 257
    rows = b"".join(b"\0" + line.tobytes() for line in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 30, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_are_noted():
    opened, notes = images.open_image(sixteen_bit_colours(), "x")
    assert (np.asarray(opened) == np.asarray(noise(40, 30))).all() and notes == ("16-bit image scaled",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_a_picture_of_several_frames_is_its_first_and_noted(kind):
    frames = [Image.new("RGB", (8, 8), (100 * i, 0, 0)) for i in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    opened, notes = images.open_image(data, "x")
    assert opened.getpixel((0, 0))[0] < 20 and "first of several frames" in notes


def test_exif_rotation_is_applied_and_noted():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(40, 30), "JPEG", exif=exif)
    opened, notes = images.open_image(data, "x")
    assert opened.size == (30, 40) == images.image_size(data, "x") and notes == ("EXIF rotation applied",)


def test_damaged_images_are_refused_by_name():
    whole = encoded(noise(400, 300), "JPEG")
    for data in (whole[: len(whole) // 2], b"", b"no image", whole[:200], encoded(noise(90, 90), "PNG")[:-3000]):
        with pytest.raises(BadSample, match=r"rows.json row 3: cannot be decoded") as caught:
            images.open_image(data, "rows.json row 3")
        assert caught.value.reason == "unreadable image"


def test_a_decompression_bomb_is_refused_before_decoding():
    bomb = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(BadSample, match="20000 x 20000 pixels, more than") as caught:
        images.open_image(bomb, "x")
    assert caught.value.reason == "decompression bomb" and len(bomb) < 100_000


def test_an_extremely_long_image_does_not_explode():
    tower = get_tower("clip-vit-large-patch14-336")
    assert images.preprocess(Image.new("RGB", (20_000, 1)), tower, "square").shape == (3, 336, 336)


def tree(folder: Path) -> Path:
    """images/{a.png, sub/b.png, link.png -> ../secret.png, store -> ../store, dangling.png}, secret.png, store/c.png"""
    images_folder = folder / "images"
    (images_folder / "sub").mkdir(parents=True)
    (folder / "store").mkdir()
    for name in ("images/a.png", "images/sub/b.png", "secret.png", "store/c.png"):
        noise(3, 3).save(folder / name)
    (images_folder / "link.png").symlink_to(folder / "secret.png")
    (images_folder / "store").symlink_to(folder / "store")
    (images_folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return images_folder


INSIDE = ["a.png", "sub/b.png", "./sub/../a.png", "{images}/a.png", "{images}/sub/b.png", "file://{images}/a.png"]
OUTSIDE = [
    "../secret.png",
    "{folder}/secret.png",
    "link.png",
    "sub/../../secret.png",
    "store/c.png",
    "{images}/link.png",
]
NOWHERE = {
    "/etc/passwd": "leads outside",
    "a\0b": "zero byte",
    "http://x.org/a.png": "web address; download it",
    "gone.png": "no such file",
    "": "leads outside",
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("trusted", [False, True])
def test_paths_below_the_image_folder_are_read(tmp_path, name, trusted):
    folder = tree(tmp_path)
    ref = ImageRef(name=name.format(images=folder, folder=tmp_path))
    assert media.open_ref(ref, str(folder), "row 5", trusted)[0].size == (3, 3)


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_outside_the_image_folder_need_trust_and_the_advice_works(tmp_path, name):
    folder = tree(tmp_path)
    ref = ImageRef(name=name.format(images=folder, folder=tmp_path))
    with pytest.raises(BadSample, match=r"row 5.*leads outside.*set data.trust_paths=true"):
        media.open_ref(ref, str(folder), "row 5")
    assert media.open_ref(ref, str(folder), "row 5", True)[0].size == (3, 3)
    if not name.startswith(("..", "link", "sub", "store")):  # an absolute name below another folder
        assert media.open_ref(ref, "/", "row 5")[0].size == (3, 3)


@pytest.mark.parametrize("name", NOWHERE)
def test_paths_to_nothing_are_refused(tmp_path, name):
    with pytest.raises(BadSample, match=NOWHERE[name]):
        media.open_ref(ImageRef(name=name), str(tree(tmp_path)), "row 5")
    with pytest.raises(BadSample, match="dangling"):
        media.open_ref(ImageRef(name="dangling.png"), str(tmp_path / "images"), "row 5", True)


def test_a_frame_that_leads_outside_is_refused(tmp_path):
    folder = tree(tmp_path)
    (folder / "frames").mkdir()
    (folder / "frames" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadSample, match="leads outside"):
        media.open_ref(ImageRef(name="frames", frame=(0, 1)), str(folder), "row 5")
    assert media.open_ref(ImageRef(name="frames", frame=(0, 1)), str(folder), "row 5", True)[0].size == (3, 3)


@pytest.mark.parametrize("disk, row", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_either_spelling_of_unicode(tmp_path, disk, row):
    noise(3, 3).save(tmp_path / unicodedata.normalize(disk, "été.png"))
    ref = ImageRef(name=unicodedata.normalize(row, "été.png"))
    assert media.open_ref(ref, str(tmp_path), "row 5")[0].size == (3, 3)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path)
    assert media.open_ref(ImageRef(name="a.png"), "~/images", "row 5")[0].size == (3, 3)


def test_a_link_inside_the_folder_and_a_linked_folder_are_fine(tmp_path):
    (tmp_path / "images").mkdir()
    noise(3, 3).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "images")
    assert media.open_ref(ImageRef(name="b.png"), str(tmp_path / "alias"), "x")[0].size == (3, 3)


def test_base64_images(tmp_path):
    data = encoded(noise(5, 4), "PNG")
    ref = ImageRef(name="data:image/png;base64," + base64.b64encode(data).decode())
    assert media.open_ref(ref, str(tmp_path), "x")[0].size == (5, 4)
    with pytest.raises(BadSample, match="broken base64"):
        media.open_ref(ImageRef(name="data:image/png;base64,@@@"), "", "x")


def test_video_frames_are_spread_evenly(tmp_path):
    frames = [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(10)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{i:03}.png")
    for name in ("v.gif", "frames"):
        opened = [media.open_ref(ImageRef(name=name, frame=(i, 5)), str(tmp_path), "x")[0] for i in range(5)]
        red = [frame.getpixel((0, 0))[0] for frame in opened]
        assert red == pytest.approx([10, 30, 50, 70, 90], abs=4), name


def test_an_undecodable_video_is_refused(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    for name in ("v.mp4", "empty"):
        with pytest.raises(BadSample) as caught:
            media.open_ref(ImageRef(name=name, frame=(0, 2)), str(tmp_path), "x")
        assert caught.value.reason == "unreadable video"
