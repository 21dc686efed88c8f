"""A LLaVA JSON becomes an indexed JSONL once, so that any row is one seek away (Energon's crude JSONL data set).

Rows are written in a random but fixed order, since Energon gives each worker a contiguous share. Rows that are not even
JSON stay in it as their own error message, so that they are counted when their turn comes.
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
from megatron_moellava.data.sample import BadSample, read_rows

FORMAT = 2  # of the cache; raise it when what is written changes
ORDER = 1  # seed of the rows' order


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    path: Path  # rows.jsonl, Energon's .idx beside it
    rows: int
    duplicates: int  # rows whose id another row has too
    duplicates_message: str  # names two of them and says what to do; "" if there are none
    fingerprint: str  # of the source file's name, size and time

    @property
    def lengths(self) -> np.ndarray:
        """Words per row in the file's order, negative for text-only rows: what the modality sampler sorts by."""
        return np.load(self.path.with_name("lengths.npy"))

    @property
    def positions(self) -> np.ndarray:
        """Row number in the file -> line in rows.jsonl."""
        return np.load(self.path.with_name("positions.npy"))


def index_json(path: str | Path, cache_folder: str | Path) -> Index:
    """Build or find the index of a JSON or JSONL file. Safe when several processes do it at once."""
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"data.sources.path={path}: {error.strerror}; give a LLaVA JSON or JSONL file") from None
    key = f"{FORMAT}|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = Path(cache_folder) / f"{path.stem}-{fingerprint}"
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
            raise DataError(f"data.cache_folder={folder.parent}: cannot write the index of {path}: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(path: Path, folder: Path) -> None:
    from tqdm import tqdm

    offsets, lengths, ids = [0], [], Counter()
    first: dict[str | int | None, int] = {}
    repeated = ""
    with open(folder / "unordered", "wb") as file:
        for row, record in tqdm(read_rows(path), desc=f"Indexing {path.name}", unit=" rows", mininterval=1):
            line, length, name = _line(path, row, record)
            ids[name] += name is not None
            first.setdefault(name, row)
            if ids[name] == 2 and not repeated:
                repeated = f"row {row} repeats the id {name!r} of row {first[name]}"
            lengths.append(length)
            offsets.append(offsets[-1] + file.write(line))
    if not lengths:
        raise DataError(f"data.sources.path={path} holds no rows; give a LLaVA JSON or JSONL file with at least one")
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
    try:
        words = sum(len(turn["value"].split()) for turn in record["conversations"])
    except (TypeError, KeyError, AttributeError):
        return 1
    return words if "image" in record or "video" in record else -words
