"""Images: equal to transformers' processors, and every odd or damaged file is mended, noted or refused."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from megatron_moellava.data import images, media
from megatron_moellava.data.sample import BadSample, ImageRef
from megatron_moellava.towers import get_tower
from tests.helpers.data_files import ASSETS

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


def test_padding_uses_the_mean_colour_and_centres():
    tower = get_tower("clip-vit-large-patch14-336")
    square = np.asarray(images.pad_to_square(noise(4, 9), tower.pad_color))
    assert square.shape == (9, 9, 3) and (square[:, :2] == (122, 116, 104)).all()
    assert (square[:, 2:6] == np.asarray(noise(4, 9))).all()


MODES = {
    "CMYK": (noise(40, 30).convert("CMYK"), "JPEG", ("CMYK colours converted",)),
    "palette": (noise(40, 30).convert("P"), "PNG", ("palette colours converted",)),
    "grey": (noise(40, 30).convert("L"), "PNG", ()),
    "bilevel": (noise(40, 30).convert("1"), "PNG", ()),
    "alpha": (noise(40, 30).convert("RGBA"), "PNG", ("alpha dropped",)),
    "1-pixel": (noise(1, 1), "PNG", ("image of one pixel",)),
    "16-bit": (Image.fromarray(np.full((30, 40), 40_000, dtype=np.uint16)), "PNG", ("16-bit image scaled",)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_colour_mode_becomes_rgb(mode):
    image, kind, notes = MODES[mode]
    opened, found = images.open_image(encoded(image, kind), "x")
    assert opened.mode == "RGB" and opened.size == image.size and found == notes
    if mode == "16-bit":
        assert (np.asarray(opened) == 40_000 >> 8).all()  # Pillow alone would clip to white


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


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png", "folder/../../secret.png", "a\0b"])
def test_paths_outside_the_image_folder_are_refused(tmp_path, name):
    (tmp_path / "images" / "folder").mkdir(parents=True)
    noise(3, 3).save(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadSample, match="row 5"):
        media.open_ref(ImageRef(name=name), str(tmp_path / "images"), "row 5")


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
