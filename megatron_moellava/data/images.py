"""Image bytes -> pixels of a vision tower, equal to transformers' image processors to one level of 255.

Pillow does the work, as in the original's processors. `image_aspect_ratio` "pad" centres the image on a square of the
tower's mean colour first; "square" hands it to the processor as it is (CLIP: shortest edge and centre crop; SigLIP:
squashed to a square). Colour modes go through Pillow's own conversion, as in the original (alpha is dropped); what
Pillow would get wrong is mended and noted: 16-bit greys are scaled, not clipped, and EXIF rotation is applied.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from megatron_moellava.data.sample import BadSample

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error; more is taken for a decompression bomb
MAX_ASPECT = 64  # a longer image would make the shortest-edge resize explode; its middle is used
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_CONVERTED = {"CMYK": "CMYK", "P": "palette", "PA": "palette"}
_ORIENTATION = 0x0112

Image.MAX_IMAGE_PIXELS = None  # checked below, before decoding, with a message that names the row


def open_image(data: bytes | str, where: str) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB image and notes, from bytes or a path. `where` is for messages. Raises BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd EXIF or palettes; what matters is raised or noted
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(
                    "decompression bomb",
                    f"{where}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; shrink the image",
                )
            return _to_rgb(image)
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample("missing image", f"{where}: no such file; check image_folder and the row's `image`") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        raise BadSample(
            "unreadable image", f"{where}: cannot be decoded ({type(error).__name__}: {error}); replace the file"
        ) from None


def image_size(data: bytes | str, where: str) -> tuple[int, int]:
    """(width, height) as open_image would give it, from the header alone."""
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except FileNotFoundError:
        raise BadSample("missing image", f"{where}: no such file; check image_folder and the row's `image`") from None
    except Exception as error:
        raise BadSample("unreadable image", f"{where}: cannot be read ({error}); replace the file") from None


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    notes = []
    rotated = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    if image.mode in _DEEP:
        values = np.asarray(image).astype(np.int64)
        image_8bit = Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).clip(0, 255).astype("u1"))
        image_8bit.info, image_8bit._exif = image.info, image.getexif()
        notes.append("16-bit image scaled")
        image = image_8bit
    if image.mode in _CONVERTED:
        notes.append(f"{_CONVERTED[image.mode]} colours converted")
    if image.size == (1, 1):
        notes.append("image of one pixel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        notes.append("alpha dropped")
    if rotated:
        image = ImageOps.exif_transpose(image)
        notes.append("EXIF rotation applied")
    if image.mode != "RGB" or "transparency" in image.info:
        return image.convert("RGB"), tuple(notes)
    image.load()  # convert() would copy
    return image, tuple(notes)


def preprocess(image: Image.Image, tower, aspect_ratio: str) -> np.ndarray:
    """Normalised pixels [3, image_size, image_size], float32."""
    if aspect_ratio == "pad":
        image = pad_to_square(image, tower.pad_color)
    return normalise(resize(image, tower), tower)


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Centred on a square canvas; the odd pixel goes to the right or below."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def resize(image: Image.Image, tower) -> Image.Image:
    size = tower.image_size
    if tower.resize == "square" or image.width == image.height:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        image = _middle(image, min(image.width, MAX_ASPECT * short), min(image.height, MAX_ASPECT * short))
        short, long = sorted(image.size)
    long = int(size * long / short)
    shape = (size, long) if image.width < image.height else (long, size)
    return _middle(image.resize(shape, Image.Resampling.BICUBIC), size, size)


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
