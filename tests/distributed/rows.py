"""The rows that every layout trains on: some with two images, some with one, some with none.

With two data-parallel ranks or more the odd ones never see an image, and with packed rows every row is its own
micro-batch, so that half of the micro-batches have none.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from megatron_moellava.config import Modality
from megatron_moellava.data.batch import Batch, pack, pad
from megatron_moellava.data.encode import IGNORE_INDEX, IMAGE_TOKEN, EncodedSample
from megatron_moellava.data.loader import Batches
from megatron_moellava.data.sample import ImageRef
from megatron_moellava.towers import Tower
from megatron_moellava.towers.branches import tower_for
from tests.helpers.modalities import DEPTH

SEQ_LENGTH = 128
# Rows of the global batch, and of a micro-batch.
NUM_ROWS = {"packed": 4, "text": 4, "padded": 8, "native": 4, "modalities": 4, "videos": 4}
MICRO_BATCH = {"packed": 1, "text": 1, "padded": 2, "native": 1, "modalities": 1, "videos": 1}
GRIDS = ((2, 6), (4, 2), (2, 2), (4, 4))  # native resolution: rows and columns of patches, even for a pixel shuffle
# Tiles with ends of lines: tiles down and across, and lines and columns of features that show something.
TILES = ((1, 2, 2, 8), (0, 0, 0, 0), (2, 1, 6, 4))
# Frames that become one set of visual tokens, and the side of the blocks: three frames in pairs, a picture before two frames,
# three frames pooled in space alone.
POOLS = (((2, 2), (1, 2)), ((1, 1), (2, 2)), ((1, 2), (1, 2), (1, 2)))
TAGS = ("color", "color+shape", "", "existence")  # question types; some ranks never meet one
IMAGES = (2, 0, 1, 0)  # of each micro-batch


def micro_batches(kind: str, vocab_size: int, tower: Tower, depth: Modality, step: int) -> list[Batch]:
    """The four micro-batches of one optimizer step."""
    return [
        _micro_batch(kind, vocab_size, tower, depth, 10 * step + index, images) for index, images in enumerate(IMAGES)
    ]


class Rows(Batches):
    """An endless loader with the interface of data.loader.Loader: data-parallel rank r takes micro-batches r, r + n, ...

    `depth`: the record of the pictures that are of depth."""

    def __init__(
        self,
        kind: str,
        vocab_size: int,
        tower: Tower,
        rank: int,
        world_size: int,
        first_step: int = 0,
        depth: Modality = DEPTH,
    ):
        self._arguments = (kind, vocab_size, tower, depth)
        self._rank, self._world_size, self._step = rank, world_size, first_step
        self._iterator = self._batches()

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from micro_batches(*self._arguments, self._step)[self._rank :: self._world_size]
            self._step += 1

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state_dict(self) -> dict:
        return {"step": self._step}


def _micro_batch(kind: str, vocab_size: int, tower: Tower, depth: Modality, seed: int, images: int) -> Batch:
    images = 0 if kind == "text" else images
    draw = np.random.default_rng(seed)
    known = GRIDS if tower.native else TILES if tower.newline else ((),)
    shape, grids = tower.pixel_shape, [known[(seed + number) % len(known)] for number in range(images)]
    if kind == "videos":
        return _with_videos(draw, str(seed), vocab_size, tower, [POOLS[(seed + n) % len(POOLS)] for n in range(images)])
    # Patches, tiles with their overview, or one tile; the frames of a video.
    counts = [grid[0] * grid[1] + tower.newline if grid else tower.num_frames for grid in grids]
    pixels = [draw.standard_normal((count, *shape), dtype=np.float32) for count in counts]
    if kind == "padded":
        per_sample = {0: (0, 0), 1: (0, 1), 2: (1, 1)}[images]
        samples = [_sample(draw, f"{seed}.{i}", vocab_size, tower, n, 30 + 10 * i) for i, n in enumerate(per_sample)]
        return pad(
            samples, pixels, 1, 0, shape
        )  # the longest row is a multiple of 4, so that every layout has this width
    if kind == "modalities":
        refs = (ImageRef(name=""), ImageRef(name="", modality=depth))[:: -1 if seed // 10 % 2 else 1][:images]
        towers = [tower_for(ref.modality, tower) for ref in refs]
        lie = [GRIDS[(seed + number) % len(GRIDS)] if own.native else () for number, own in enumerate(towers)]
        counts = [math.prod(grid) for grid in lie]  # of one image, or of its patches
        pixels = [
            draw.standard_normal((count, *own.pixel_shape), dtype=np.float32)
            for count, own in zip(counts, towers, strict=True)
        ]
        features = tuple(
            count if grid else own.num_features for count, grid, own in zip(counts, lie, towers, strict=True)
        )
        sample = _sample(draw, f"{seed}.0", vocab_size, tower, images, 11, features=sum(features))
        samples = [
            replace(sample, images=refs, features=features, grids=tuple(lie) if tower.native else ()),
            _sample(draw, f"{seed}.1", vocab_size, tower, 0, 13),
        ]
        return pack(samples, pixels, SEQ_LENGTH, 0, shape, (depth.name,) if depth.is_apart else ())
    samples = [_sample(draw, f"{seed}.{i}", vocab_size, tower, 1, 11 + i, grid) for i, grid in enumerate(grids)]
    samples += [_sample(draw, f"{seed}.{i}", vocab_size, tower, 0, 13 + i) for i in range(images, 3)]
    return pack(samples, pixels, SEQ_LENGTH, 0, shape)


def _with_videos(draw, name: str, vocab_size: int, tower: Tower, videos: list) -> Batch:
    """A packed row of three samples, the first ones with a video each."""
    pixels = [
        draw.standard_normal((sum(frames for frames, _ in pools), *tower.pixel_shape), dtype=np.float32)
        for pools in videos
    ]
    samples = [
        _sample(draw, f"{name}.{number}", vocab_size, tower, int(bool(pools)), 11 + number, pools=pools)
        for number, pools in enumerate([*videos, (), (), ()][:3])
    ]
    return pack(samples, pixels, SEQ_LENGTH, 0, tower.pixel_shape)


def _sample(
    draw, name: str, vocab_size: int, tower: Tower, images: int, words: int, grid=(), pools=(), features: int = 0
) -> EncodedSample:
    """`words` random words after the images; the later two thirds are trained on. `features`: of all images together, where
    they differ."""
    text = draw.integers(3, vocab_size, words)
    images, features = (1, features) if features else (images, tower.num_frames * tower.num_features)
    if grid:
        features = grid[0] * grid[1] // tower.shuffle**2 if tower.native else features + (grid[2] * (grid[3] + 1) or 1)
    if pools:
        features = sum(features if side == 1 else (math.isqrt(features) // side) ** 2 for _, side in pools)
    tokens = np.concatenate([np.full(images * features, IMAGE_TOKEN), text])
    labels = np.append(tokens[1:], IGNORE_INDEX)
    labels[: len(tokens) - 2 * words // 3] = IGNORE_INDEX
    return EncodedSample(
        id=name,
        tag=TAGS[len(text) % len(TAGS)],
        tokens_S=tokens.astype(np.int64),
        labels_S=labels.astype(np.int64),
        grids=(grid,) if grid else (),
        pools=pools,
    )
