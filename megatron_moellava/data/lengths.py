"""Tokens of every sample, measured once: what packing an epoch into whole rows has to know.

The lengths lie beside the index. They belong to a source's content, the tokenizer, the template and the limits; a few
samples are measured again at each start and tell when any of that has changed. Rows that could not be used are always
measured again, so a repaired picture is not missed.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataError
from megatron_moellava.data.encode import EncodedSample
from megatron_moellava.data.pairs import EncodedPair
from megatron_moellava.data.pipeline import Pipeline
from megatron_moellava.data.sample import BadSample
from megatron_moellava.towers.branches import tower_for

PROBES = 64  # samples measured again at each start
CHUNK = 512  # samples a process measures at a time
FEW = 4 * CHUNK  # are measured without further processes


def measured_lengths(pipeline: Pipeline, key: list, folder: str | Path) -> np.ndarray:
    """int32 [number of samples], 0 for one that cannot be used. `key`: what else they depend on, as JSON.

    Where `counts_work` int64 [number of samples, 2]: beside the tokens the tower's work (`Tower.work`) with the sample's
    pictures.

    Raises DataError where the lengths cannot be written.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(folder) / f"lengths-{digest}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            lengths = _known(path, pipeline)
            if lengths is None:
                lengths = _measure(pipeline, np.arange(len(pipeline.reader)))
                work = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
                with open(work, "wb") as file:
                    np.save(file, lengths)
                work.rename(path)
    except OSError as error:
        raise DataError(
            f"cannot write the samples' lengths into {path.parent} ({error}); set checkpoint.save to a folder that can be "
            "written, or copy the data to one"
        ) from None
    unusable = np.flatnonzero(tokens_of(lengths) == 0)
    lengths[unusable] = _measure(pipeline, unusable)
    return lengths


def counts_work(pipeline: Pipeline) -> bool:
    """Whether what a sample's pictures cost the tower does not follow from their tokens: at native resolution, where frames of
    videos are pooled behind it, and where modalities have towers of their own."""
    own_towers = any(modality.tower for modality in pipeline.data.modalities)
    return pipeline.tower.native or pipeline.data.video_pooling != "none" or own_towers


def tokens_of(lengths: np.ndarray) -> np.ndarray:
    """The tokens of what `measured_lengths` gives."""
    return lengths if lengths.ndim == 1 else lengths[:, 0]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process measures, the others wait for its result."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: all measure, with the same result
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _known(path: Path, pipeline: Pipeline) -> np.ndarray | None:
    count = len(pipeline.reader)
    try:
        lengths = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    if lengths.shape != ((count, 2) if counts_work(pipeline) else (count,)):
        return None
    probes = np.unique(np.linspace(0, count - 1, min(count, PROBES)).astype(np.int64))
    probes = probes[tokens_of(lengths)[probes] > 0]
    return lengths if (_measure(pipeline, probes) == lengths[probes]).all() else None


_PIPELINE: Pipeline | None = None  # of the forked processes


def _measure(pipeline: Pipeline, numbers: np.ndarray) -> np.ndarray:
    global _PIPELINE
    if len(numbers) <= FEW:
        return _measured(pipeline, numbers)
    from tqdm import tqdm

    _PIPELINE = pipeline
    chunks = [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]
    try:
        with (
            multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool,
            tqdm(total=len(numbers), desc="Measuring", unit=" samples", mininterval=1) as bar,
        ):
            found = []
            for part in pool.imap(_lengths, chunks):
                found.append(part)
                bar.update(len(part))
    finally:
        _PIPELINE = None
    return np.concatenate(found)


def _lengths(numbers: np.ndarray) -> np.ndarray:
    assert _PIPELINE is not None
    return _measured(_PIPELINE, numbers)


def _measured(pipeline: Pipeline, numbers: np.ndarray) -> np.ndarray:
    found = [_length(pipeline, int(number)) for number in numbers]
    if counts_work(pipeline):
        return np.array(found, dtype=np.int64).reshape(-1, 2)
    return np.array([tokens for tokens, _ in found], dtype=np.int32)


def _length(pipeline: Pipeline, number: int) -> tuple[int, int]:
    """(tokens, the tower's work with pictures at native resolution or with pooled frames)"""
    try:
        encoded, *_ = pipeline.encode(number)
    except BadSample:
        return 0, 0
    return len(encoded), int(_work(encoded, pipeline.tower))


def _work(encoded: EncodedSample | EncodedPair, tower) -> float:
    """`Tower.work` of a sample's pictures, in a pass through `tower`, the model's: a tower of another width or depth counts as
    much more or less."""
    read = encoded.chosen if isinstance(encoded, EncodedPair) else encoded  # a pair shares its pictures
    kinds = list(zip(read.images, read.features, strict=True))
    grids, images = [grid for grid in read.grids if grid], sum(images for images, _ in read.pools)
    if tower.newline:
        images = sum(1 + down * across for down, across, *_ in grids)
    elif not read.pools:
        images = sum(tokens for ref, tokens in kinds if not ref.is_apart) // tower.num_features
    work = images * tower.work(tower.num_rows)
    if tower.native:
        work = sum(tower.work(rows * columns) for rows, columns in grids)
    for ref, tokens in kinds:
        if ref.is_apart:
            own = tower_for(ref.modality, tower)
            size = own.hidden_size * own.num_used_layers / (tower.hidden_size * tower.num_used_layers)
            work += tokens // own.num_features * own.work(own.num_rows) * size
    return work
