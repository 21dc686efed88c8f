"""Opening what is on disk as named `Tensor`s, without reading the weights: safetensors, `.bin`, Megatron checkpoints."""

import itertools
import json
import math
import pickle
from pathlib import Path

from megatron_moellava.checkpoint.safe_pickle import guard
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.tensors import ITEM_SIZES, Tensor, Tile, whole
from megatron_moellava.conversion.torch_file import Window, data_offset, record_offset
from megatron_moellava.mapping import Shape

SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
}


def open_huggingface(folder: Path) -> dict[str, Tensor]:
    """Tensors of a Hugging Face folder, or of one `.safetensors` or `.bin` file. Safetensors win over `.bin`.

    Raises CheckpointError where there are no weights.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist")
    if folder.is_file():
        return open_bin(folder) if folder.suffix in (".bin", ".pt", ".pth") else open_safetensors(folder)
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        files = _listed(folder, stem)
        if files:
            return _merged([(file, opener(file)) for file in files])
    raise CheckpointError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin (single or with an index){_instead(folder)}"
    )


# What else such folders hold, and what to do with it.
INSTEAD = {
    "adapter_config.json": "a LoRA adapter: import its base first, and then the adapter with --adapter BASE",
    "adapter_model.safetensors": "a LoRA adapter without adapter_config.json: merge it into its base model first",
    "adapter_model.bin": "a LoRA adapter without adapter_config.json: merge it into its base model first",
    "non_lora_trainables.bin": "a LoRA run: merge its adapter into the base model first, and import the result",
    "mm_projector.bin": (
        "the projector of stage 1: import the language model, and give this file: "
        "moellava convert import LANGUAGE_MODEL --tower TOWER --projector {folder}/mm_projector.bin"
    ),
    "tf_model.h5": "weights of TensorFlow: save the model anew with transformers as safetensors",
    "flax_model.msgpack": "weights of Flax: save the model anew with transformers as safetensors",
    "consolidated.00.pth": "Meta's own layout: convert it with transformers' convert_llama_weights_to_hf.py first",
    "latest": "a checkpoint of DeepSpeed: make weights of it with its zero_to_fp32.py first",
}


def _instead(folder: Path) -> str:
    if broken := sorted(file.name for file in folder.iterdir() if file.is_symlink() and not file.exists()):
        return f"; {', '.join(broken[:3])} there are links to files that are gone: copy with `cp -L`, or download again"
    found = next((text for name, text in INSTEAD.items() if (folder / name).exists()), None)
    return f"; it holds {found.format(folder=folder)}" if found else "; give the folder of a downloaded model"


def _listed(folder: Path, stem: str) -> list[Path]:
    """The files of an index, or the single file, or nothing. A shard that the index names must be there."""
    index = folder / f"{stem}.index.json"
    if not index.exists():
        return [folder / stem] if (folder / stem).exists() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error}); download it again") from None
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{index} names {', '.join(missing)}, which are missing; download the folder again")
    return [folder / name for name in names]


def _merged(opened: list[tuple[Path, dict[str, Tensor]]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file, part in opened:
        twice = tensors.keys() & part.keys()
        if twice:
            raise CheckpointError(f"{file} repeats tensors of another shard: {', '.join(sorted(twice)[:5])}")
        tensors |= part
    return tensors


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """The header of a safetensors file (8 bytes of length, then JSON, then the data).

    Raises CheckpointError for a damaged or truncated file and for unknown dtypes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(f"{file} is not a safetensors file or is truncated; copy it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} has a damaged header ({error}); copy it again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = SAFETENSORS_TYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{file}: {name} has dtype {entry['dtype']}; supported: {', '.join(SAFETENSORS_TYPES)}"
            )
        if 8 + length + end > size or math.prod(entry["shape"]) * ITEM_SIZES[dtype] != end - begin:
            raise CheckpointError(f"{file}: {name} does not fit in the file; it is truncated, copy it again")
        tensors[name] = whole(str(file), 8 + length + begin, tuple(entry["shape"]), dtype)
    return tensors


def open_bin(file: Path) -> dict[str, Tensor]:
    """A file of `torch.save`, opened with weights_only (no code in it can run) and memory-mapped (nothing is read).

    torch does not tell where in the file a storage lies, but all lie in one mapping, in the file's order: the lowest
    address belongs to the first record. CheckpointError for one that is damaged or holds more than tensors.
    """
    from zipfile import BadZipFile, ZipFile, is_zipfile

    import torch

    if not is_zipfile(file):
        raise CheckpointError(f"{file} {_no_archive(file)}")
    try:
        with ZipFile(file) as archive, file.open("rb") as stream:
            records = [item for item in archive.infolist() if "/data/" in item.filename and item.file_size]
            offsets = [record_offset(stream, item.header_offset) for item in records]
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} is not a plain dictionary of tensors written by torch.save: {error}") from None
    values = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    rest = loaded.keys() - values.keys()
    if rest:
        raise CheckpointError(f"{file} holds more than tensors: {', '.join(map(str, sorted(rest)[:5]))}")
    base = min((value.untyped_storage().data_ptr() for value in values.values() if value.numel()), default=0)
    base -= min(offsets, default=0)
    tensors = {}
    for name, value in values.items():
        offset = value.data_ptr() - base
        known = value.untyped_storage().data_ptr() - base in offsets
        if value.numel() and not (known and value.is_contiguous()):
            raise CheckpointError(f"{file}: {name} is not stored contiguously; save it again with .contiguous()")
        tensors[name] = whole(str(file), offset, tuple(value.shape), str(value.dtype).removeprefix("torch."))
    return tensors


def _no_archive(file: Path) -> str:
    """Before version 1.6, torch.save wrote pickles one after the other; their tensors cannot be mapped."""
    with file.open("rb") as stream:
        start = stream.read(64)
    if start.startswith(b"\x80"):
        return (
            "has the format that torch.save had before version 1.6; write it anew: "
            "torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file; fetch it with `git lfs pull`"
    return "is not a file of torch.save, or is cut off; copy it again"


def open_megatron(folder: Path) -> dict[str, Tensor]:
    """Tensors of a Megatron-Core `torch_dist` checkpoint folder; optimizer states and other objects included by name.

    Raises CheckpointError for a folder without .metadata.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    guard()
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a Megatron checkpoint: it has no .metadata; give an iter_ folder"
        ) from None
    tensors = {}
    places = _places(metadata)
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            shape = tuple(entry.size)
            tiles = [tile for chunk in places.get(key, ()) for tile in _tiles(folder, chunk, shape, dtype)]
            tensors[key] = Tensor(shape, dtype, tuple(sorted(tiles, key=lambda tile: (tile.rows, tile.columns))))
    return tensors


def _places(metadata) -> dict[str, list]:
    """For each key: (offsets, sizes, where) of its chunks."""
    places: dict[str, list] = {}
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in metadata.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", ())
    }
    for index, where in metadata.storage_data.items():
        if index.offset is not None:
            offsets = tuple(index.offset)
            places.setdefault(index.fqn, []).append((offsets, sizes[index.fqn, offsets], where))
    return places


def _tiles(folder: Path, chunk, shape: Shape, dtype: str):
    """A chunk of a tensor with any number of axes, as rectangles of rows and columns."""
    offsets, sizes, where = chunk
    path = Path(folder) / where.relative_path
    nbytes = math.prod(sizes) * ITEM_SIZES[dtype]
    try:
        with path.open("rb") as stream:
            window = Window(stream, where.offset, where.length)
            position = where.offset + data_offset(window, nbytes, f"{path} at byte {where.offset}")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, copy it again") from None
    if len(shape) < 2:
        start = offsets[0] if offsets else 0
        yield Tile(str(path), position, (start, start + math.prod(sizes)), (0, 1))
        return
    columns = (offsets[-1], offsets[-1] + sizes[-1])
    height, bytes_per_row = sizes[-2], sizes[-1] * ITEM_SIZES[dtype]
    for number, leading in enumerate(itertools.product(*(range(size) for size in sizes[:-2]))):
        row = 0
        for axis, index in enumerate(leading):
            row = (row + offsets[axis] + index) * shape[axis + 1]
        row += offsets[-2]
        yield Tile(str(path), position + number * height * bytes_per_row, (row, row + height), columns)
