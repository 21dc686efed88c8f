"""A request -> tokens with room for its images, and their pixels, by the code that training uses."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from megatron_moellava.config import DataConfig, DataError, Modality
from megatron_moellava.data import images, media, native
from megatron_moellava.data import tiling as grid
from megatron_moellava.data.encode import IMAGE_TOKEN, answer_ends, check_template, encode
from megatron_moellava.data.plan import Plan
from megatron_moellava.data.pooling import Frame
from megatron_moellava.data.quantities import MODALITY, PLAIN, kinds_of
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, ImageRef, Sample
from megatron_moellava.data.templates import Template
from megatron_moellava.data.tokenizer import Tokenizer
from megatron_moellava.data.video import FRAME
from megatron_moellava.inference.requests import Request
from megatron_moellava.towers import POOLINGS, Pooling, Tower
from megatron_moellava.towers.branches import tower_for


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """A request as the model reads it."""

    tokens: list[int]  # every visual token is an IMAGE_TOKEN
    pixels_NCHW: torch.Tensor  # the tiles of all images; N may be 0. At native resolution: their patches
    tiles: tuple[int, ...]  # of each image; at native resolution: patches
    features: tuple[int, ...] = ()  # visual tokens of each image
    grids: tuple[tuple[int, ...], ...] = ()  # how each image's tokens lie (`Plan.grid`), of towers that have that
    blocks: tuple[int, ...] = ()  # of images that are frames pooled together: side of the blocks in space; empty: all 1
    modalities: tuple[str, ...] = ()  # of each image, "image" for a plain one; empty: all are
    # tiles of each image whose modality is apart (`config.Modality`), which are not in pixels_NCHW, else None; empty: all are
    apart: tuple[torch.Tensor | None, ...] = ()
    digests: tuple[bytes, ...] = field(init=False)  # of each image as the tower sees it

    def __post_init__(self) -> None:
        parts = self.parts
        grids = [repr(grid).encode() for grid in self.grids] or [b""] * len(parts)
        if self.blocks:
            grids = [
                repr((side, len(part))).encode() if side > 1 else b""
                for part, side in zip(parts, self.blocks, strict=True)
            ]
        ways = [self.way(number).encode() for number in range(len(parts))]
        found = [
            hashlib.sha256(part.numpy().tobytes() + grid + way)
            for part, grid, way in zip(parts, grids, ways, strict=True)
        ]
        object.__setattr__(self, "digests", tuple(digest.digest() for digest in found))

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tiles of each image."""
        apart = self.apart or (None,) * len(self.tiles)
        own = [tiles for tiles, part in zip(self.tiles, apart, strict=True) if part is None]
        shared = iter(self.pixels_NCHW.split(own) if own else ())
        return tuple(next(shared) if part is None else part for part in apart)

    def way(self, number: int) -> str:
        """The modality of an image that is apart; "" for others."""
        return self.modalities[number] if self.apart and self.apart[number] is not None else ""

    @property
    def widths(self) -> tuple[int, ...]:
        """Visual tokens of each image; without `features` all tiles have as many."""
        each = self.tokens.count(IMAGE_TOKEN) // max(sum(self.tiles), 1)
        return self.features or tuple(tiles * each for tiles in self.tiles)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompter:
    """Turns requests into prompts. ConfigError for a tokenizer without the template's control tokens."""

    template: Template
    tokenizer: Tokenizer
    tower: Tower
    data: DataConfig

    def __post_init__(self) -> None:
        check_template(self.template, self.tokenizer)

    def __call__(self, request: Request) -> Prompt:
        """Raises DataError when turns and images do not belong together."""
        turns = request.turns
        if not turns or turns[-1].role != "user":
            raise DataError(f"request {request.id}: the last turn must be the user's")
        if any(turn.role != ("user", "assistant")[number % 2] for number, turn in enumerate(turns)):
            raise DataError(f"request {request.id}: turns must alternate user, assistant, user")
        placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        if request.images and placeholders != len(request.images):
            raise DataError(f"request {request.id}: {placeholders} `<image>` for {len(request.images)} images")
        kinds = [self.kind(image) for image in request.images]
        names = tuple(
            ImageRef(name=str(number), frame=image.info.get(FRAME), modality=kind)
            for number, (image, kind) in enumerate(zip(request.images, kinds, strict=True))
        )
        media.check_videos(names, self.tower, f"request {request.id}")
        plans = self.plans(request.images, f"request {request.id}")
        towers = [self.tower_of(image) for image in request.images]
        pixels = [
            self._pixels(image, request.image_aspect_ratio, plan, own)
            for image, plan, own in zip(request.images, plans or [None] * len(towers), towers, strict=True)
        ]
        frames, pooling = [image.info.get(FRAME) for image in request.images], POOLINGS[self.data.video_pooling]
        features = tuple(plan.tokens for plan in plans)
        if not plans:
            tiles = [len(part) for part in pixels]
            features = media.widths_of(kinds, frames, tiles, self.tower, pooling)
        ids, _ = encode(
            Sample(id=request.id, origin=request.id, turns=turns, images=names), self.template, self.tokenizer
        )
        is_apart = [kind is not None and kind.is_apart for kind in kinds]
        shared = [part for part, own in zip(pixels, is_apart, strict=True) if not own]
        found = Prompt(
            tokens=expand(ids, list(features)),
            pixels_NCHW=torch.from_numpy(np.concatenate(shared)) if shared else torch.zeros(0, *self.tower.pixel_shape),
            apart=tuple(torch.from_numpy(part) if own else None for part, own in zip(pixels, is_apart, strict=True))
            if any(is_apart)
            else (),
            tiles=tuple(len(part) for part in pixels),
            features=features,
            grids=tuple(plan.grid for plan in plans),
            modalities=kinds_of(image.info.get(MODALITY, PLAIN) for image in request.images),
        )
        if self.tower.takes_videos:
            return _together(found, frames, Pooling(1, self.tower.num_frames))
        return found if plans or pooling == POOLINGS["none"] else _together(found, frames, pooling)

    def plans(self, images: Sequence[Image.Image], where: str) -> tuple[Plan, ...]:
        """What becomes of images, where their sizes decide that. DataError for more than fit into a sample's budget."""
        if not self.tower.has_grids:
            return ()
        sizes = [None if FRAME in image.info else image.size for image in images]
        return media.plans_of_sizes(sizes, self.tower, self.data, where, [self.kind(image) for image in images])

    def kind(self, image: Image.Image) -> Modality | None:
        """The modality of an open picture; None: it is a plain one."""
        name = image.info.get(MODALITY)
        return next((item for item in self.data.modalities if item.name == name), None)

    def tower_of(self, image: Image.Image) -> Tower:
        """The tower that sees an open picture."""
        return tower_for(self.kind(image), self.tower)

    def _pixels(self, image: Image.Image, aspect_ratio: str, plan: Plan | None, tower: Tower) -> np.ndarray:
        is_frame, lies = FRAME in image.info, plan.grid if plan else ()
        if plan is not None and tower.native:
            return native.patches(image, tower, plan, is_frame)
        if lies[0] if lies else self.data.image_grid and not is_frame:
            return grid.tile(image, tower)
        shape = self.data.image_aspect_ratio if aspect_ratio == "model" else aspect_ratio
        return images.preprocess(image, tower, shape)[None]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end of text, and the template's end where it has a token."""
        return answer_ends(self.template, self.tokenizer)[0]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The template's end as text, where it has no token."""
        return answer_ends(self.template, self.tokenizer)[1]


def _together(prompt: Prompt, frames: Sequence[Frame], pooling: Pooling) -> Prompt:
    """Frames that are pooled together, or go through the tower together, as one image of the prompt."""
    starts = [number for number, frame in enumerate(frames) if frame is None or frame[0] % pooling.temporal == 0]
    spans = list(pairwise([*starts, len(frames)]))
    return replace(
        prompt,
        tiles=tuple(sum(prompt.tiles[start:end]) for start, end in spans),
        features=tuple(sum(prompt.features[start:end]) for start, end in spans),
        blocks=tuple(1 if frames[start] is None else pooling.spatial for start in starts),
        modalities=tuple(prompt.modalities[start] for start in starts) if prompt.modalities else (),
        apart=tuple(prompt.apart[start] for start in starts) if prompt.apart else (),
    )


def expand(ids: list[int], features: list[int]) -> list[int]:
    """[5, IMAGE_TOKEN, 7], [2] -> [5, IMAGE_TOKEN, IMAGE_TOKEN, 7]."""
    widths = iter(features)
    return [part for token in ids for part in ([token] * next(widths) if token == IMAGE_TOKEN else [token])]
