"""Where the bytes of an image come from: a file below the image folder, a tar member, base64 text, a frame of a video."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from megatron_moellava.config import Modality
from megatron_moellava.data import geometry, images, native, quantities
from megatron_moellava.data import tiling as grid
from megatron_moellava.data.encode import EncodedSample
from megatron_moellava.data.encoder import Encoder
from megatron_moellava.data.paths import locate
from megatron_moellava.data.plan import Plan
from megatron_moellava.data.pooling import Frame, pools, widths
from megatron_moellava.data.regions import View, rewrite
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, BadSample, ImageRef, Sample
from megatron_moellava.data.video import FRAME, Video, last_video, open_video
from megatron_moellava.towers import POOLINGS, Pooling, Tower
from megatron_moellava.towers.branches import own_tower, tower_for


def source(ref: ImageRef, folder: str, where: str, trusted: bool = False) -> bytes | str:
    """Bytes or path of an image, or of a video. BadSample for broken base64."""
    if ref.data is not None:
        return ref.data
    if ref.name.startswith("data:"):
        try:
            return base64.b64decode(ref.name.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadSample(
                "unreadable image", f"{where}: broken base64 {ref.key} ({error}); encode it again"
            ) from None
    return locate(folder, ref.name, where, trusted, ref.key)


def _size(ref: ImageRef, folder: str, where: str, data) -> tuple[int, int]:
    return images.image_size(
        source(ref, folder, where, data.trust_paths), f"{where}, {ref.key} {ref.name[:80]!r}", ref.key
    )


def open_ref(ref: ImageRef, folder: str, where: str, trusted: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB image and notes."""
    if ref.frame is not None and not ref.is_still:
        video = last_video(source(ref, folder, where, trusted), f"{where}, video {ref.name[:80]!r}", trusted)
        return video.frame(video.clip.pick(*ref.frame))
    where, origin = f"{where}, {ref.key} {ref.name[:80]!r}", where
    data = source(ref, folder, origin, trusted)
    return (
        images.open_image(data, where) if ref.modality is None else quantities.open_picture(data, ref.modality, where)
    )


def pixels(ref: ImageRef, folder: str, where: str, tower, aspect_ratio: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Normalised pixels [3, H, W] and notes."""
    image, notes = open_ref(ref, folder, where)
    return images.preprocess(image, tower, aspect_ratio), notes


def plans(refs: Sequence[ImageRef], folder: str, where: str, tower, data) -> tuple[Plan, ...]:
    """What becomes of a sample's pictures, of a tower that `has_grids`, from the files' headers alone. Raises BadSample."""
    sizes = [None if ref.frame is not None else _size(ref, folder, where, data) for ref in refs]
    return plans_of_sizes(sizes, tower, data, where, [ref.modality for ref in refs])


def plans_of_sizes(
    sizes: Sequence[tuple[int, int] | None], tower, data, where: str, kinds: Sequence[Modality | None] = ()
) -> tuple[Plan, ...]:
    """The same of their (width, height); None: a frame of a video. `kinds`: the modality of each; empty: all are plain."""
    owns = [None if kind is None else own_tower(kind) for kind in kinds] or [None] * len(sizes)
    shared = [size for size, own in zip(sizes, owns, strict=True) if own is None]
    found = iter(
        native.plans(shared, tower, data, where) if tower.native else grid.plans(shared, tower, data.image_grid)
    )
    return tuple(
        next(found) if own is None else _of_one_size(size, own, data) for size, own in zip(sizes, owns, strict=True)
    )


def _of_one_size(size: tuple[int, int] | None, own: Tower, data) -> Plan:
    tiles = grid.num_tiles(*size, own.image_size, own.tiles) if data.image_grid and size else 1
    return Plan(tiles * own.num_features, ())


def check_videos(refs: Sequence[ImageRef], tower, where: str) -> None:
    """Raises BadSample where a tower that takes whole videos would get anything else. `tower`: the model's."""
    for modality in dict.fromkeys(ref.modality for ref in refs):
        own = tower_for(modality, tower)
        wrong = [place for ref in refs if ref.modality == modality for place in [ref.frame] if not _fits(place, own)]
        if wrong:
            found = "a picture" if wrong[0] is None else f"{wrong[0][1]} frames of a video"
            raise BadSample(
                "no whole video",
                f"{where}: shows {found}, and {own.name} attends across the {own.num_frames} frames of a video; name videos in "
                f"`video`, with data.video_frames={own.num_frames}, or use a tower for pictures such as "
                "languagebind-image-large-patch14",
            )


def _fits(place: Frame, tower) -> bool:
    return not tower.takes_videos or (place is not None and place[1] == tower.num_frames)


def _check_cut(rest: Sequence[ImageRef], length: int, tower, where: str) -> None:
    """Raises BadSample where the pictures that are cut off begin within a video that the tower takes whole."""
    if rest and rest[0].frame and rest[0].frame[0] and tower_for(rest[0].modality, tower).takes_videos:
        raise BadSample(
            "too long",
            f"{where}: {length} tokens with its videos, and the cut would go through one, which the tower takes whole; shorten "
            "the row, or raise data.seq_length and data.max_sample_length",
        )


def encoded(encoder: Encoder, sample: Sample, folder: str, where: str, tower, data) -> EncodedSample:
    """Tokens and labels, with as much room for each picture as this tower needs. Raises BadSample."""
    check_videos(sample.images, tower, where)
    if not tower.has_grids:
        counts = [num_tiles(ref, folder, where, tower, data) for ref in sample.images]
        frames, pooling = [ref.frame for ref in sample.images], POOLINGS[data.video_pooling]
        kinds = [ref.modality for ref in sample.images]
        found = encoder(sample, widths_of(kinds, frames, counts, tower, pooling))
        _check_cut(sample.images[len(found.images) :], found.length, tower, where)
        shared = [number for number, ref in enumerate(found.images) if not ref.is_apart]
        return replace(found, pools=pools([frames[n] for n in shared], [counts[n] for n in shared], pooling))
    made = plans(sample.images, folder, where, tower, data)
    found = encoder(sample, tuple(plan.tokens for plan in made))
    return replace(found, grids=tuple(plan.grid for plan in made[: len(found.images)]))


def widths_of(
    kinds: Sequence[Modality | None], frames: Sequence[Frame], tiles: Sequence[int], tower, pooling: Pooling
) -> tuple[int, ...]:
    """Visual tokens of each picture, of towers without grids: `pooling.widths`, each by the tower of its modality."""
    shared = widths(frames, tiles, tower.num_features, pooling)
    return tuple(
        count * tower_for(kind, tower).num_features if kind is not None and kind.tower else width
        for kind, count, width in zip(kinds, tiles, shared, strict=True)
    )


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
    tower = tower_for(ref.modality, tower)
    image, notes = open_ref(ref, folder, where, data.trust_paths)
    if plan is not None and tower.native:
        return native.patches(image, tower, plan, ref.frame is not None), notes
    if data.image_grid and ref.frame is None and (plan is None or not plan.grid or plan.grid[0]):
        return grid.tile(image, tower), notes
    return images.preprocess(image, tower, data.image_aspect_ratio)[None], notes


def num_tiles(ref: ImageRef, folder: str, where: str, tower, data) -> int:
    """T of `tiles`, from the file's header alone."""
    if not data.image_grid or ref.frame is not None:
        return 1
    size = _size(ref, folder, where, data)
    tower = tower_for(ref.modality, tower)
    return grid.num_tiles(*size, tower.image_size, tower.tiles)


def frame_texts(name: str, folder: str, where: str, data) -> Sequence[str]:
    """What the text says for each frame that is shown of a video. Raises BadSample where that depends on the video."""
    if not data.video_fps and data.video_times == "none":
        return [IMAGE_PLACEHOLDER] * data.video_frames
    origin = source(ImageRef(name=name, frame=(0, 1)), folder, where, data.trust_paths)
    return last_video(origin, f"{where}, video {name[:80]!r}", data.trust_paths).clip.texts(data)


def show_video(
    origin: bytes | str, where: str, data, span: tuple[float, float] | None = None, rate: float | None = None
) -> tuple[str, list[Image.Image]]:
    """(text with an `<image>` for each frame, frames) as training shows a video; `span`: from and to, in seconds; `rate`:
    frames per second, where that is known better than by the file.

    Raises BadSample for what is no video.
    """
    video = open_video(origin, where)
    video.clip = replace(video.clip, rate=rate or video.clip.rate)
    return shown_frames(video, data, span)


def shown_frames(video: Video, data, span: tuple[float, float] | None = None) -> tuple[str, list[Image.Image]]:
    """`show_video` of one that is open."""
    clip = video.clip.cut(*span) if span else video.clip
    texts = clip.texts(data)
    frames = [video.frame(clip.pick(index, len(texts)))[0] for index in range(len(texts))]
    for index, frame in enumerate(frames):
        frame.info[FRAME] = (index, len(frames))
    return "".join(texts), frames


def view(stored: geometry.Map, tower, data, plan: Plan | None = None, is_frame: bool = False) -> View:
    """How a picture, or a frame of a video, lies in its file and in what the tower sees; `plan`: of towers that have grids."""
    width, height = map(int, stored.size)
    if tower.native and plan is not None:
        rows, columns = plan.grid
        shown = geometry.padded(width, height) if is_frame else geometry.Map(size=(width, height))
        seen = shown.then(geometry.scaled(shown.size, (columns * tower.patch_size, rows * tower.patch_size)))
    else:
        tiled = not is_frame and (bool(plan.grid[0]) if plan and plan.grid else data.image_grid)
        seen = geometry.seen(width, height, tower, aspect_ratio=data.image_aspect_ratio, grid=tiled)
    return View(stored=stored, seen=seen)


def write_regions(sample: Sample, folder: str, tower, data) -> Sample:
    """The sample with its boxes, points and polygons as text in `data.box_format`. Raises BadSample."""
    if not sample.regions:
        return sample
    where = sample.origin
    stored = [
        images.upright(source(ref, folder, where, data.trust_paths), f"{where}, {ref.key} {ref.name[:80]!r}", ref.key)
        for ref in sample.images
    ]
    made: tuple = plans(sample.images, folder, where, tower, data) if tower.has_grids else (None,) * len(stored)
    towers = [tower_for(ref.modality, tower) for ref in sample.images]
    views = [view(turn, own, data, plan) for turn, own, plan in zip(stored, towers, made, strict=True)]
    texts = [turn.text for turn in sample.turns]
    texts, notes = rewrite(texts, sample.regions, sample.box_format, data.box_format, views, sample.origin)
    turns = tuple(replace(turn, text=text) for turn, text in zip(sample.turns, texts, strict=True))
    return replace(sample, turns=turns, regions=(), notes=(*sample.notes, *notes))
