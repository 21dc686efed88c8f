"""Sources on disk -> records by sample number: indexed files and WebDataset shards."""

import hashlib
import json
import os
import struct
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataError
from megatron_moellava.data.first_rows import shard_counts
from megatron_moellava.data.index import Index, index_json
from megatron_moellava.data.order import SHARD_RUN, Share
from megatron_moellava.data.paths import natural
from megatron_moellava.data.sample import BadSample, Sample

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta

MEMBER_TYPES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
OPEN_TARS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    """A source of `data.sources` that was found on disk and counted."""

    path: str  # of the file or the folder of shards
    folder: str  # image names are below it
    rows: int
    weight: float  # times per epoch
    fingerprint: str  # of the content
    index: Index | None  # None: shards
    duplicates: int = 0  # rows whose id another row has too
    duplicates_message: str = ""

    @property
    def required_index(self) -> Index:
        """The index of a file's rows."""
        assert self.index is not None, f"{self.path} is a folder of shards"
        return self.index

    @property
    def share(self) -> Share:
        """What the order of samples needs to know of it."""
        return Share(self.rows, self.weight, 1 if self.index is not None else SHARD_RUN)


def open_sources(sources, cache_folder: str | Path | None) -> tuple[list[OpenSource], list[str]]:
    """(sources, notes). What is listed twice is one source with the summed weight."""
    opened: dict[tuple[str, str], OpenSource] = {}
    notes = []
    for source in sources:
        entry = open_source(source, cache_folder)
        key = (entry.fingerprint, os.path.realpath(entry.folder))
        if key in opened:
            weight = opened[key].weight + entry.weight
            notes.append(f"{source.path} is listed twice: one source, whose rows are seen {weight:g} times per epoch")
            entry = replace(opened[key], weight=weight)
        opened[key] = entry
    return list(opened.values()), notes


def open_source(source, cache_folder: str | Path | None) -> OpenSource:
    """A file, indexed if it is not yet (`cache_folder`: where to), or a folder of shards. Raises DataError."""
    path = Path(source.path).expanduser()
    folder = os.path.expanduser(source.image_folder) or str(path.parent)
    if path.is_dir():
        return _open_shards(path, folder, source.weight)
    index = index_json(path, cache_folder or path.parent / ".moellava_index")
    return OpenSource(
        path=str(path),
        folder=folder,
        rows=index.rows,
        weight=source.weight,
        fingerprint=index.fingerprint,
        index=index,
        duplicates=index.duplicates,
        duplicates_message=index.duplicates_message,
    )


def _open_shards(path: Path, folder: str, weight: float) -> OpenSource:
    counts = shard_counts(path)
    shards = _shards(path)
    digest = hashlib.sha256(json.dumps([counts, _content(path, shards)], sort_keys=True).encode()).hexdigest()[:16]
    report = path / "report.json"  # of moellava prepare-data
    known = json.loads(report.read_text()) if report.exists() else {}
    rows = sum(shard.count for shard in shards)
    if not rows:
        raise DataError(f"data.sources.path={path} holds no rows; write the shards again")
    return OpenSource(
        path=str(path.resolve()),
        folder=folder,
        rows=rows,
        weight=weight,
        fingerprint=digest,
        index=None,
        duplicates=known.get("rows_with_duplicate_id", 0),
        duplicates_message=known.get("duplicates_message", ""),
    )


def _shards(path: Path):
    """Energon's ShardInfo of each shard of the training split."""
    try:
        meta = WebdatasetMeta.from_config(EPath(str(path)), split_part="train")
    except (OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        raise DataError(
            f"data.sources.path={path}: its .nv-meta cannot be used ({error}); run `energon prepare`"
        ) from None
    if meta.sample_excludes:
        raise DataError(
            f"data.sources.path={path}: .nv-meta/split.yaml excludes single samples, such as "
            f"{min(meta.sample_excludes)}, which is not supported; exclude whole shards, or write the shards without them"
        )
    return meta.shards


def _content(path: Path, shards) -> list:
    """What tells one set of shards from another of the same counts: the byte offsets of all samples."""
    found = []
    for shard in shards:
        index = path / f"{shard.name}.idx"
        found.append(hashlib.sha256(index.read_bytes()).hexdigest() if index.exists() else "")
    return found


class Reader:
    """Records of all sources by sample number: rows of the first source in the file's order, then those of the next."""

    def __init__(self, sources: list[OpenSource]):
        self.sources = sources
        self.starts = np.cumsum([0, *(source.rows for source in sources)])
        self._readers = [ShardRows(source) if source.index is None else FileRows(source) for source in sources]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, number: int) -> tuple[dict, str, str, dict[str, bytes]]:
        """(record, origin, image folder, image members of a tar). Raises BadSample."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        record, origin, members = self._readers[source].read(int(number - self.starts[source]))
        return record, origin, self.sources[source].folder, members

    @staticmethod
    def with_members(sample: Sample, members: dict[str, bytes]) -> Sample:
        """The sample with its images from the tar, in the record's order.

        Members are found by the record's names, without folders and the sample's own key. Names that fit none are only
        passed over where nothing can be confused: all are unknown, and the members have one order.
        Raises BadSample where names and members do not fit.
        """
        if not members or not sample.images:
            return sample
        names = [ref.name for ref in sample.images]
        found = [_member(name, members) for name in names]
        if not any(found) and len(members) == len(set(names)):
            by_number = sorted(members, key=natural)
            if by_number != list(members):
                raise BadSample(
                    "image order",
                    f"{sample.origin}: the record's names {names[:3]} are not those of its members {list(members)[:3]}, and "
                    "these are not in the order of their numbers; name the members in `image`",
                )
            places = dict(zip(dict.fromkeys(names), members, strict=True))
            found = [places[name] for name in names]
        if missing := [name for name, key in zip(names, found, strict=True) if key is None]:
            raise BadSample(
                "missing image", f"{sample.origin}: {missing[0]!r} is not in the shard; write the shard again"
            )
        keys = [key for key in found if key is not None]
        images = zip(sample.images, keys, strict=True)
        return replace(sample, images=tuple(replace(ref, data=members[key]) for ref, key in images))


def _member(name: str, members: dict[str, bytes]) -> str | None:
    """`000.1.png`, `images/000.1.png` and `1.png` are the member 1.png; `000.png` is the member png."""
    base = name.replace("\\", "/").rpartition("/")[2]
    if base in members:
        return base
    ending = [key for key in members if base.endswith(f".{key}")]
    whole = [key for key in ending if "." in key or len(members) == 1]
    return max(whole, key=len) if whole else None


class FileRows:
    """Rows of an indexed file."""

    def __init__(self, source: OpenSource):
        index = source.required_index
        self.path, self.positions, self.offsets = index.path, index.positions, index.offsets

    def read(self, row: int) -> tuple[dict, str, dict[str, bytes]]:
        """(record, where it comes from, no files) of sample `row`; BadSample for a row that is not JSON."""
        line = self.positions[row]
        start, end = (int(offset) for offset in self.offsets[line : line + 2])
        with open(self.path, "rb") as file:
            file.seek(start)
            content = json.loads(file.read(end - start))
        if "bad" in content:
            raise BadSample(*content["bad"])
        return content["record"], f"{content['file']} row {content['row']}", {}


class ShardRows:
    """Samples of WebDataset shards."""

    def __init__(self, source: OpenSource):
        self.path = EPath(source.path)
        # Opened in the process that reads: its file handles must not be shared.
        self._reader: ShardInfosITarReader | None = None
        self._process = 0

    def read(self, row: int) -> tuple[dict, str, dict[str, bytes]]:
        """(record, where it comes from, files by name) of sample `row`. BadSample for what cannot be read."""
        if self._reader is None or self._process != os.getpid():
            self._reader = ShardInfosITarReader(self.path, _shards(Path(str(self.path))), itar_cache_size=OPEN_TARS)
            self._process = os.getpid()
        try:
            sample = self._reader[row]
        except (ValueError, OSError, EOFError, tarfile.TarError, AssertionError, struct.error) as error:
            where = f"{self._reader}: sample {row}"
            raise BadSample("corrupt shard", f"{where} cannot be read ({error}); write the shard again") from None
        return read_members(sample)


def read_members(sample: dict) -> tuple[dict, str, dict[str, bytes]]:
    """(record, origin, image members in the tar's order) of the files of one key in a tar.

    Raises BadSample without a readable .json.
    """
    content = sample.get("json")
    members = {key: value for key, value in sample.items() if key.rpartition(".")[2].lower() in MEMBER_TYPES}
    origin = f"{sample['__shard__']} sample {sample['__key__']}"
    if content is None:
        raise BadSample("not a record", f"{origin}: no .json member; prepare the shards with moellava prepare-data")
    try:
        return json.loads(content.decode("utf-8", "surrogateescape")), origin, members
    except (ValueError, RecursionError) as error:
        raise BadSample("invalid JSON", f"{origin}: not valid JSON ({error}); write the shard again") from None
