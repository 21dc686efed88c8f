"""Writing what recipes describe: safetensors folders and Megatron checkpoints, streamed, and complete or not there.

A folder is written under the name `FOLDER.tmp` and renamed at the end: an interrupted conversion leaves nothing that
loads. Data files are left to the operating system to flush, as `cp` leaves them: waiting for the disk made a conversion
several times slower than `cp`.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_moellava.checkpoint.folders import UNFINISHED
from megatron_moellava.checkpoint.integrity import HashingFile, file_digests
from megatron_moellava.config import ConfigError
from megatron_moellava.conversion.readers import SAFETENSORS_TYPES
from megatron_moellava.conversion.recipes import Recipe, Tensors, stream
from megatron_moellava.conversion.tensors import BLOCK, ITEM_SIZES, Files
from megatron_moellava.conversion.torch_file import MAX_BYTES, frame

SHARD_BYTES = 4_500_000_000  # per file, as Hugging Face's 5 GB with room for the header
METADATA_FILES = (".metadata", "metadata.json")  # of a Megatron checkpoint
CHUNK_BYTES = 256 << 20  # per piece of a Megatron tensor: loading reads whole pieces into memory
Progress = Callable[[int], object]  # called with the bytes just written


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends well, and is removed when it does not.

    Raises ConfigError when `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists; choose another --save, or remove it first")
    staging = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(staging, ignore_errors=True)  # of a conversion that was interrupted
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write(file: HashingFile, recipe: Recipe, tensors: Tensors, files: Files, progress: Progress) -> None:
    written = 0
    for block in stream(recipe, tensors, files):
        file.write(block)
        progress(len(block))
        written += len(block)
    assert written == recipe.nbytes, f"{recipe.name}: wrote {written} of {recipe.nbytes} bytes"


def write_safetensors(folder: Path, recipes: list[Recipe], tensors: Tensors, progress: Progress) -> dict[str, str]:
    """`model.safetensors`, or shards with an index when the tensors exceed `SHARD_BYTES`. Returns {file: SHA-256}."""
    shards = _shards(recipes)
    names = ["model.safetensors"] if len(shards) == 1 else _shard_names(len(shards))
    weight_map, digests = {}, {}
    with Files() as files:
        for name, shard in zip(names, shards, strict=True):
            with HashingFile(folder / name) as file:
                file.write(_safetensors_header(shard))
                for recipe in shard:
                    _write(file, recipe, tensors, files, progress)
                    weight_map[recipe.name] = name
            digests[name] = file.digest
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(recipe.nbytes for recipe in recipes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return digests


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _shards(recipes: list[Recipe]) -> list[list[Recipe]]:
    shards: list[list[Recipe]] = [[]]
    filled = 0
    for recipe in recipes:
        if shards[-1] and filled + recipe.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(recipe)
        filled += recipe.nbytes
    return shards


def _safetensors_header(recipes: list[Recipe]) -> bytes:
    names = {ours: theirs for theirs, ours in SAFETENSORS_TYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for recipe in recipes:
        offsets = [position, position + recipe.nbytes]
        header[recipe.name] = {"dtype": names[recipe.dtype], "shape": list(recipe.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_megatron(folder: Path, recipes: list[Recipe], tensors: Tensors, progress: Progress) -> dict[str, str]:
    """A Megatron-Core `torch_dist` folder: `.distcp` files, `.metadata` and `metadata.json`.

    Megatron-Core 0.19's dist_checkpointing.load reads it under any parallel layout. Torch's own writer needs every
    tensor in memory at once; here each piece is framed as `torch.save` would and its bytes are streamed from the
    source. Returns {file: SHA-256}.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    metadata = Metadata(state_dict_metadata={}, planner_data=None, storage_data={})
    with Files() as files, _Distcp(folder) as out:
        _add_common_state(out, metadata)
        for recipe in recipes:
            _add_tensor(out, metadata, recipe, tensors, files, progress)
    _write_metadata(folder, metadata)
    return out.digests | file_digests(folder, METADATA_FILES)


class _Distcp:
    """The numbered data files of rank 0; a new one is begun when the last is full."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self.digests: dict[str, str] = {}  # of the files that are finished
        self._open()

    def __enter__(self) -> "_Distcp":
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def _open(self) -> None:
        self.name = f"__0_{self._number}.distcp"
        self.file = HashingFile(self._folder / self.name)
        self._number += 1

    def _close(self) -> None:
        self.file.close()
        self.digests[self.name] = self.file.digest

    def start(self) -> int:
        """Position at which the next piece begins."""
        if self.file.tell() > SHARD_BYTES:
            self._close()
            self._open()
        return self.file.tell()


def _add_common_state(out: _Distcp, metadata) -> None:
    """Megatron-Core keeps what is not a tensor under this key; a converted checkpoint has nothing to say there."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    key = "common_state/shard_0_1"
    content = io.BytesIO()
    torch.save([{}], content)
    start = out.start()
    out.file.write(content.getbuffer())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = _StorageInfo(out.name, start, out.file.tell() - start)


def _add_tensor(out: _Distcp, metadata, recipe: Recipe, tensors: Tensors, files: Files, progress: Progress) -> None:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    chunks = []
    for number, (offsets, sizes, piece) in enumerate(pieces(recipe)):
        start = out.start()
        head, tail = frame(sizes, recipe.dtype, piece.nbytes // ITEM_SIZES[recipe.dtype], piece.nbytes)
        out.file.write(head)
        _write(out.file, piece, tensors, files, progress)
        out.file.write(tail)
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        index = MetadataIndex(recipe.name, torch.Size(offsets), number)
        metadata.storage_data[index] = _StorageInfo(out.name, start, out.file.tell() - start)
    properties = TensorProperties(dtype=getattr(torch, recipe.dtype))
    metadata.state_dict_metadata[recipe.name] = TensorStorageMetadata(properties, torch.Size(recipe.shape), chunks)


def pieces(recipe: Recipe) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Recipe]]:
    """(offsets, sizes, recipe) of the pieces that a tensor is stored in: slices of the first axis, CHUNK_BYTES or less.

    An expert is a slice, so that a rank of an expert-parallel group reads its own experts only.
    """
    rows = recipe.shape[0]
    row_count = sum(part.count for part in recipe.parts) // rows
    row_bytes = row_count * ITEM_SIZES[recipe.dtype]
    assert row_bytes < MAX_BYTES
    step = 1 if len(recipe.shape) > 2 and row_bytes >= BLOCK else max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        offsets = (first, *(0 for _ in recipe.shape[1:]))
        sizes = (count, *recipe.shape[1:])
        parts = tuple(_cut(recipe.parts, first * row_count, (first + count) * row_count))
        yield offsets, sizes, Recipe(recipe.name, sizes, recipe.dtype, parts)


def _cut(parts, start: int, stop: int):
    """The parts that make elements [start, stop) of the target."""
    position = 0
    for part in parts:
        first, last = max(start, position), min(stop, position + part.count)
        if first < last:
            assert part.columns is None or last - first == part.count, (
                "a part that takes columns is an expert's, and whole"
            )
            yield replace(part, start=part.start + first - position, count=last - first)
        position += part.count


def _write_metadata(folder: Path, metadata) -> None:
    import pickle

    tensors, backend = METADATA_FILES
    (folder / tensors).write_bytes(pickle.dumps(metadata))
    (folder / backend).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
