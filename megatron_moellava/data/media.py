"""Where the bytes of an image come from: a file below the image folder, a tar member, base64 text, a frame of a video."""

import base64
import binascii
import importlib.util
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from megatron_moellava.data import images, native
from megatron_moellava.data import tiling as grid
from megatron_moellava.data.encode import EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.plan import Plan
from megatron_moellava.data.sample import BadSample, ImageRef, Sample

STILLS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ANIMATED = (".gif", ".webp", ".apng", ".png")


def locate(folder: str, name: str, where: str, trusted: bool = False) -> str:
    """The file of an image name: below the folder, also after following symlinks, unless paths are `trusted`.

    A name may be absolute. Raises BadSample.
    """
    if "\0" in name:
        raise BadSample("missing image", f"{where}: image name {name!r} holds a zero byte; correct it")
    if name.startswith(("http://", "https://")):
        raise BadSample(
            "missing image", f"{where}: image {name[:80]!r} is a web address; download it and name the file"
        )
    root = os.path.realpath(os.path.expanduser(folder or "."))
    path = _existing(os.path.realpath(os.path.join(root, name.removeprefix("file://"))))
    if not trusted and not path.startswith(root.rstrip(os.sep) + os.sep):
        raise BadSample(
            "outside image folder",
            f"{where}: image {name!r} leads outside image_folder={folder!r}, to {path}; if you trust the data, set "
            "data.trust_paths=true (--trust-paths of prepare-data)",
        )
    return path


def _existing(path: str) -> str:
    """The path, or its other spelling in Unicode: archives from a Mac have `é` as two characters."""
    forms = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]
    return next((os.path.realpath(form) for form in forms if os.path.exists(form)), path)


def source(ref: ImageRef, folder: str, where: str, trusted: bool = False) -> bytes | str:
    """Bytes or path of an image, or of a video. BadSample for broken base64."""
    if ref.data is not None:
        return ref.data
    if ref.name.startswith("data:"):
        try:
            return base64.b64decode(ref.name.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadSample("unreadable image", f"{where}: broken base64 image ({error}); encode it again") from None
    return locate(folder, ref.name, where, trusted)


def open_ref(ref: ImageRef, folder: str, where: str, trusted: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB image and notes."""
    if ref.frame is not None:
        return _frame(source(ref, folder, where, trusted), *ref.frame, where, trusted)
    return images.open_image(source(ref, folder, where, trusted), f"{where}, image {ref.name[:80]!r}")


def pixels(ref: ImageRef, folder: str, where: str, tower, aspect_ratio: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Normalised pixels [3, H, W] and notes."""
    image, notes = open_ref(ref, folder, where)
    return images.preprocess(image, tower, aspect_ratio), notes


def plans(refs: Sequence[ImageRef], folder: str, where: str, tower, data) -> tuple[Plan, ...]:
    """What becomes of a sample's pictures, of a tower that `has_grids`, from the files' headers alone. Raises BadSample."""
    sizes = [
        None
        if ref.frame is not None
        else images.image_size(source(ref, folder, where, data.trust_paths), f"{where}, image {ref.name[:80]!r}")
        for ref in refs
    ]
    return plans_of_sizes(sizes, tower, data, where)


def plans_of_sizes(sizes: Sequence[tuple[int, int] | None], tower, data, where: str) -> tuple[Plan, ...]:
    """The same of their (width, height); None: a frame of a video."""
    if tower.native:
        return native.plans(sizes, tower, data, where)
    return grid.plans(sizes, tower, data.image_grid)


def encoded(encoder: Encoder, sample: Sample, folder: str, where: str, tower, data) -> EncodedSample:
    """Tokens and labels, with as much room for each picture as this tower needs. Raises BadSample."""
    if not tower.has_grids:
        counts = [num_tiles(ref, folder, where, tower, data) for ref in sample.images]
        return encoder(sample, tuple(count * tower.num_features for count in counts))
    made = plans(sample.images, folder, where, tower, data)
    found = encoder(sample, tuple(plan.tokens for plan in made))
    return replace(found, grids=tuple(plan.grid for plan in made[: len(found.images)]))


def pixels_of(sample: EncodedSample, folder: str, where: str, tower, data) -> list[tuple[np.ndarray, tuple[str, ...]]]:
    """`tiles` of each picture of an encoded sample. Raises BadSample."""
    made: list = [Plan(*plan) for plan in zip(sample.features, sample.grids, strict=False)]
    return [
        tiles(ref, folder, where, tower, data, plan)
        for ref, plan in zip(sample.images, made or [None] * len(sample.images), strict=True)
    ]


def tiles(
    ref: ImageRef, folder: str, where: str, tower, data, plan: Plan | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Normalised pixels [T, 3, H, W] and notes; T = 1 unless data.image_grid. At native resolution patches [P, 3, H, W], by
    their `plan`."""
    image, notes = open_ref(ref, folder, where, data.trust_paths)
    if plan is not None and tower.native:
        return native.patches(image, tower, plan, ref.frame is not None), notes
    if data.image_grid and ref.frame is None and (plan is None or plan.grid[0]):
        return grid.tile(image, tower), notes
    return images.preprocess(image, tower, data.image_aspect_ratio)[None], notes


def num_tiles(ref: ImageRef, folder: str, where: str, tower, data) -> int:
    """T of `tiles`, from the file's header alone."""
    if not data.image_grid or ref.frame is not None:
        return 1
    size = images.image_size(source(ref, folder, where, data.trust_paths), f"{where}, image {ref.name[:80]!r}")
    return grid.num_tiles(*size, tower.image_size, tower.tiles)


def _frame(
    origin: bytes | str, index: int, count: int, where: str, trusted: bool
) -> tuple[Image.Image, tuple[str, ...]]:
    """The index-th of `count` frames, each from the middle of its share of the video."""
    if isinstance(origin, str) and Path(origin).is_dir():
        files = [file for file in Path(origin).iterdir() if file.suffix.lower() in STILLS]
        files.sort(key=lambda file: natural(file.name))
        if not files:
            raise BadSample("unreadable video", f"{where}: folder {origin} holds no frames; add images or name a file")
        chosen = files[_pick(index, count, len(files))]
        return images.open_image(locate(origin, chosen.name, where, trusted), f"{where}, frame {chosen.name!r}")
    if isinstance(origin, str) and not Path(origin).exists():
        raise BadSample("missing image", f"{where}: no such video; check image_folder and the row's `video`")
    if isinstance(origin, str) and not origin.lower().endswith(ANIMATED):
        return _decode_video(origin, index, count, where), ()
    try:
        with Image.open(origin) as video:
            total = getattr(video, "n_frames", 1)
            return images.to_rgb(ImageSequence.Iterator(video)[_pick(index, count, total)])
    except Exception as error:
        raise BadSample("unreadable video", f"{where}: cannot be decoded ({error}); replace the file") from None


def _decode_video(path: str, index: int, count: int, where: str) -> Image.Image:
    if importlib.util.find_spec("av") is None:  # only for containers such as mp4
        raise BadSample("unreadable video", f"{where}: decoding {path} needs `pip install av`")
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            total = stream.frames or sum(1 for _ in container.decode(stream))
            container.seek(0)
            wanted = _pick(index, count, total)
            for number, frame in enumerate(container.decode(stream)):
                if number == wanted:
                    return frame.to_image()
    except Exception as error:
        raise BadSample("unreadable video", f"{where}: cannot be decoded ({error}); replace the file") from None
    raise BadSample("unreadable video", f"{where}: {path} ends before frame {wanted}; replace the file")


def natural(name: str) -> list:
    """Sorts `frame_2` before `frame_10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _pick(index: int, count: int, total: int) -> int:
    return min((2 * index + 1) * total // (2 * count), total - 1)
