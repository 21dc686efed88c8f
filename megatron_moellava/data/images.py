"""Image bytes -> pixels of a vision tower, equal to transformers' image processors to one level of 255.

Pillow does the work, as in the original's processors. `image_aspect_ratio` "pad" centres the image on a square of the
tower's mean colour first; "square" hands it to the processor as it is (CLIP: shortest edge and centre crop; SigLIP:
squashed to a square). Colour modes go through Pillow's own conversion, as in the original (alpha is dropped); what
Pillow would get wrong is mended and noted: deep greys are scaled by the bits that the file's type says, not clipped, and
EXIF rotation is applied. What a picture shows never decides how it is read: frames of one sequence stay comparable.
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from megatron_moellava.data import geometry
from megatron_moellava.data.sample import BadSample

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error; more is taken for a decompression bomb
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF; a format of 2 is signed
_CONVERTED = {  # mode -> note
    "CMYK": "CMYK colours converted",
    "P": "palette colours converted",
    "PA": "palette colours converted",
    "LAB": "LAB colours converted",
    "YCbCr": "YCbCr colours converted",
    "HSV": "HSV colours converted",
}
ORIENTATION = 0x0112
FIRST_FRAME = "first of several frames"
_SEQUENCES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")  # formats whose further frames a picture would lose

Image.MAX_IMAGE_PIXELS = None  # checked below, before decoding, with a message that names the row


def open_image(data: bytes | str, where: str, key: str = "image") -> tuple[Image.Image, tuple[str, ...]]:
    """RGB image and notes, from bytes or a path. `where`, and the row's `key`, are for messages. Raises BadSample."""
    with opened(data, where, key) as image:
        return to_rgb(image)


@contextmanager
def opened(data: bytes | str, where: str, key: str = "image") -> Iterator[Image.Image]:
    """The picture as Pillow opens it, from bytes or a path; whatever goes wrong with it inside of the block is a BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF or palettes; what matters is raised or noted
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(
                    "decompression bomb",
                    f"{where}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; shrink the image",
                )
            yield image
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample("missing image", f"{where}: no such file; check image_folder and the row's `{key}`") from None
    except UnidentifiedImageError:  # its message names an address in memory
        raise BadSample(
            "unreadable image", f"{where}: cannot be decoded: no picture that Pillow knows; replace the file"
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise BadSample(
            "unreadable image", f"{where}: cannot be decoded ({type(error).__name__}: {error}); replace the file"
        ) from None


def image_size(data: bytes | str, where: str, key: str = "image") -> tuple[int, int]:
    """(width, height) as open_image would give it, from the header alone. BadSample for what is no picture."""
    width, height = upright(data, where, key).size
    return int(width), int(height)


def upright(data: bytes | str, where: str, key: str = "image") -> geometry.Map:
    """From the picture as stored to the one that open_image gives, from the header alone.

    BadSample for what is no picture.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            return geometry.upright(image.size, image.getexif().get(ORIENTATION, 1))
    except FileNotFoundError:
        raise BadSample("missing image", f"{where}: no such file; check image_folder and the row's `{key}`") from None
    except UnidentifiedImageError:
        raise BadSample(
            "unreadable image", f"{where}: cannot be read: no picture that Pillow knows; replace it"
        ) from None
    except Exception as error:
        raise BadSample("unreadable image", f"{where}: cannot be read ({error}); replace the file") from None


def to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Three 8-bit channels, and notes on what that took."""
    notes = []
    tiles = getattr(image, "tile", ())
    layout = str(tiles[0][3]) if tiles else ""  # as in the file; gone once anything has been decoded
    rotated = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    if has_more_frames(image):
        notes.append(FIRST_FRAME)
    image, deep = _to_8_bits(image, layout)
    notes += deep
    if image.mode in _CONVERTED:
        notes.append(_CONVERTED[image.mode])
    if image.size == (1, 1):
        notes.append("image of one pixel")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        notes.append("alpha dropped")
    if rotated:
        image = ImageOps.exif_transpose(image)
        notes.append("EXIF rotation applied")
    if image.mode == "LAB":  # the one mode that convert() does not know
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None  # only a conversion in place returns nothing
        return converted, tuple(notes)
    if image.mode in ("La", "RGBa"):  # colours premultiplied with alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode != "RGB" or "transparency" in image.info:
        return image.convert("RGB"), tuple(notes)
    image.load()  # convert() would copy
    return image, tuple(notes)


def _to_8_bits(image: Image.Image, layout: str) -> tuple[Image.Image, list[str]]:
    """Greys of more than 8 bits: level 255 is the brightest that the type can hold. (image, notes)"""
    if (
        image.mode == "F"
    ):  # a type without a brightest level: 0 to 255 are taken as levels, others clipped, as in Pillow
        return image.convert("L"), ["float levels clipped"]
    if not is_deep(image):
        return image, ["16-bit image scaled"] if ";16" in layout else []  # Pillow reads their upper 8 bits
    bits, signed = grey_bits(image)
    used = bits - 1 if signed else bits
    levels = (deep_levels(image).clip(0) >> (used - 8)).clip(0, 255).astype(np.uint8)
    if white_is_zero(image):  # Pillow knows that of 8 bits only
        levels = 255 - levels
    small = Image.fromarray(levels)
    small.info, small._exif = dict(image.info), image.getexif()
    small.info.pop("transparency", None)  # a grey level of the deep image
    return small, [f"{bits}-bit image scaled"]


def _tags(image: Image.Image) -> Mapping:
    """Of a TIFF file."""
    return getattr(image, "tag_v2")  # noqa: B009 - Pillow annotates it on the class for TIFF files alone


def has_more_frames(image: Image.Image) -> bool:
    """Whether a file that has just been opened has frames beside the one that is read."""
    return getattr(image, "n_frames", 1) > 1 and image.tell() == 0 and image.format in _SEQUENCES


def white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF file says that its level 0 is white."""
    return image.format == "TIFF" and _tags(image).get(_PHOTOMETRIC) == 0


def is_deep(image: Image.Image) -> bool:
    """Whether it is a grey of whole numbers of more than 8 bits."""
    return image.mode == "I" or image.mode.startswith("I;16")


def deep_levels(image: Image.Image) -> np.ndarray:
    """The levels of a picture that `is_deep`, int64 [H, W], as the file holds them."""
    levels = np.asarray(image).astype(np.int64)
    return levels & 0xFFFFFFFF if grey_bits(image) == (32, False) else levels  # Pillow holds those as signed ones


def grey_bits(image: Image.Image) -> tuple[int, bool]:
    """(bits per level, signed) of a picture that `is_deep`, by the file's type."""
    if image.format != "TIFF":
        deep = image.mode == "I" and image.format not in ("PNG", "PPM")  # these two have 16 bits in a wider mode
        return (32, True) if deep else (16, False)
    (bits, *_) = _tags(image).get(_BITS_PER_SAMPLE, (16,))
    (kind, *_) = _tags(image).get(_SAMPLE_FORMAT, (1,))
    if bits not in (12, 16, 32):
        raise ValueError(f"greys of {bits} bits are not supported")
    return int(bits), int(kind) == 2


def preprocess(image: Image.Image, tower, aspect_ratio: str) -> np.ndarray:
    """Normalised pixels [3, image_size, image_size], float32."""
    if aspect_ratio == "pad":
        image = pad_to_square(image, tower.pad_color)
    return normalise(resize(image, tower), tower)


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centred on a square canvas; the odd pixel goes to the right or below."""
    if image.width == image.height:
        return image
    square = geometry.padded(image.width, image.height)
    canvas = Image.new("RGB", (int(square.size[0]), int(square.size[1])), color)
    canvas.paste(image, (int(square.shift[0]), int(square.shift[1])))
    return canvas


def resize(image: Image.Image, tower) -> Image.Image:
    """The picture at the tower's size: shortest edge and centre crop, or squashed where the tower says "square"."""
    size = tower.image_size
    if tower.resize == "square" or image.width == image.height:
        return image.resize((size, size), resampling(tower))
    kept, shape = geometry.shortest_edge(image.width, image.height, size)
    if kept != image.size:
        image = _middle(image, *kept)
    return _middle(image.resize(shape, resampling(tower)), size, size)


def resampling(tower) -> Image.Resampling:
    """How the tower's processor interpolates pixels."""
    return Image.Resampling[tower.resample.upper()]


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def normalise(image: Image.Image, tower) -> np.ndarray:
    """(level / 255 - mean) / std, [3, H, W]; channel by channel, since strided arrays are slow."""
    pixels_CHW = np.empty((3, image.height, image.width), dtype=np.float32)
    for band, plane, mean, std in zip(image.split(), pixels_CHW, tower.image_mean, tower.image_std, strict=True):
        plane[...] = np.asarray(band)  # converting by itself: numpy's mixed product would go through a small buffer
        plane *= np.float32(1 / (255 * std))
        plane -= np.float32(mean / std)
    return pixels_CHW


def file_type(data: bytes, types: dict[str, str]) -> str:
    """The file extension that belongs to the content, whatever the file was called."""
    with Image.open(io.BytesIO(data)) as image:
        return types.get(image.format or "", "png")
