"""A file of records becomes an indexed JSON Lines file once, so that any row is one seek away.

Rows are written in a random but fixed order, so that the first ones stand for all. Rows that are not even JSON stay in
it as their own error message, so that they are counted when their turn comes.
"""

import hashlib
import json
import os
import random
import shutil
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataError
from megatron_moellava.data.rows import HELP, read_rows
from megatron_moellava.data.sample import BadSample

FORMAT = 3  # of the cache; raise it when what is written changes
ORDER = 1  # seed of the rows' order


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """An indexed copy of one source file, on disk."""

    path: Path  # rows.jsonl, its lines' offsets in rows.jsonl.idx
    rows: int
    duplicates: int  # rows whose id another row has too
    duplicates_message: str  # names two of them and says what to do; "" if there are none
    fingerprint: str  # of the source file's content, wherever it lies

    @property
    def offsets(self) -> np.ndarray:
        """Bytes at which the lines of rows.jsonl begin, and its size."""
        return np.fromfile(self.path.with_suffix(".jsonl.idx"), dtype=np.uint64).astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Words per row in the file's order, negative for text-only rows: what the modality sampler sorts by."""
        return np.load(self.path.with_name("lengths.npy"))

    @property
    def positions(self) -> np.ndarray:
        """Row number in the file -> line in rows.jsonl."""
        return np.load(self.path.with_name("positions.npy"))


def index_json(path: str | Path, cache_folder: str | Path) -> Index:
    """Build or find the index of a file of records. Safe when several processes do it at once.

    Raises DataError for a file that cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise DataError(f"data.sources.path={path}: {error.strerror}; {HELP}") from None
    folder = Path(cache_folder) / f"{path.name.partition('.')[0] or 'rows'}-{fingerprint}-{FORMAT}"
    if not (folder / "info.json").exists():
        _build(path, folder)
    info = json.loads((folder / "info.json").read_text())
    return Index(path=folder / "rows.jsonl", fingerprint=fingerprint, **info)


def _build(path: Path, folder: Path) -> None:
    work = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        _write(path, work)
        work.rename(folder)
    except OSError as error:
        if not (folder / "info.json").exists():  # else another process was faster, with the same content
            raise DataError(
                f"cannot write the index of {path} into {folder.parent} ({error}); set checkpoint.save to a folder that "
                "can be written, or copy the data to one"
            ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, folder: Path) -> None:
    from tqdm import tqdm

    offsets, lengths = [0], []
    ids: Counter[str] = Counter()
    first: dict[str, int] = {}
    repeated = ""
    with open(folder / "unordered", "wb") as file:
        for row, record in tqdm(read_rows(path), desc=f"Indexing {path.name}", unit=" rows", mininterval=1):
            line, length, name = _line(path, row, record)
            key = str(name)  # messages and metrics show 3 and "3" alike
            ids[key] += name is not None
            first.setdefault(key, row)
            if ids[key] == 2 and not repeated:
                repeated = f"row {row} repeats the id {name!r} of row {first[key]}"
            lengths.append(length)
            offsets.append(offsets[-1] + file.write(line))
    if not lengths:
        raise DataError(f"data.sources.path={path} holds no rows; give a file with at least one")
    order = list(range(len(lengths)))
    random.Random(ORDER).shuffle(order)
    with (
        open(folder / "unordered", "rb") as source,
        open(folder / "rows.jsonl", "wb") as rows,
        open(folder / "rows.jsonl.idx", "wb") as index,
    ):
        for row in order:
            index.write(struct.pack("Q", rows.tell()))
            source.seek(offsets[row])
            rows.write(source.read(offsets[row + 1] - offsets[row]))
        index.write(struct.pack("Q", rows.tell()))
    (folder / "unordered").unlink()
    np.save(folder / "lengths.npy", np.array(lengths, dtype=np.int32))
    np.save(folder / "positions.npy", np.argsort(np.array(order)))
    duplicates = sum(count for count in ids.values() if count > 1)
    info = {"rows": len(lengths), "duplicates": duplicates, "duplicates_message": ""}
    if duplicates:
        info["duplicates_message"] = (
            f"{repeated}, {duplicates:,} rows in all share theirs with another; all are trained, but messages and "
            "metrics cannot tell them apart: give each row its own id"
        )
    (folder / "info.json").write_text(json.dumps(info))


def _line(path: Path, row: int, record) -> tuple[bytes, int, str | int | None]:
    """(line, signed number of words, id)"""
    try:
        if isinstance(record, BadSample):
            raise record
        line = json.dumps({"row": row, "file": path.name, "record": record})
    except BadSample as error:
        line = json.dumps({"row": row, "file": path.name, "bad": [error.reason, str(error)]})
    except (ValueError, RecursionError):
        message = f"{path.name} row {row}: nested too deeply; remove it"
        line = json.dumps({"row": row, "file": path.name, "bad": ["invalid JSON", message]})
    name = record.get("id") if isinstance(record, dict) else None
    return line.encode() + b"\n", _num_words(record), name if isinstance(name, str | int) else None


def _num_words(record) -> int:
    """Negative for a row without the field of a picture, as in the original."""
    try:
        turns = record.get("conversations") or record["messages"]
        words = sum(len(str(turn.get("value", turn.get("content"))).split()) for turn in turns)
    except (TypeError, KeyError, AttributeError):
        return 1
    return words if any(key in record for key in ("image", "images", "video")) else -words
