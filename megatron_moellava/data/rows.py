"""Files of records -> rows: a JSON list, JSON Lines or JSON objects one after the other, plain or compressed; Parquet.

What a file is, its first bytes say, never its name. Nothing is passed over: what follows a JSON list, a key that an
object has twice, or a file of another kind is an error that says what to do.
"""

import base64
import bz2
import codecs
import gzip
import importlib.util
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from megatron_moellava.config import DataError
from megatron_moellava.data.annotations import rows_of
from megatron_moellava.data.bad_sample import BadSample

CHUNK = 1 << 24  # characters held while walking a JSON list; a single row must fit in MAX_ROW
MAX_ROW = 1 << 27
PARQUET_ROWS = 256  # decoded at a time

COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
FOREIGN = {  # (offset, bytes) -> what it is and what to do
    (0, b"PK\x03\x04"): "a zip archive: unpack it and name the JSON file",
    (0, b"\x28\xb5\x2f\xfd"): "compressed with zstd: unpack it (`zstd -d`) or compress it with gzip",
    (0, b"\xff\xfe"): "UTF-16: convert it with `iconv -f utf-16 -t utf-8`",
    (0, b"\xfe\xff"): "UTF-16: convert it with `iconv -f utf-16 -t utf-8`",
    (0, b"ARROW1"): "an Arrow file: write it as JSON Lines (`datasets.Dataset.to_json`) or Parquet",
    (0, b"SQLite format 3"): "a database: write its rows as JSON Lines",
    (257, b"ustar"): "a tar: put the WebDataset shards into a folder, run `energon prepare` on it, and name the folder",
}
HELP = "give a JSON, JSON Lines (also .gz, .bz2, .xz) or Parquet file; docs/reference/data.md lists the formats"


def read_rows(path: str | Path) -> Generator[tuple[int, Any]]:
    """`stored_rows`, with annotations of boxes as the conversations that annotations.py makes of them."""
    row = 0
    for number, record in stored_rows(path):
        for part in rows_of(record, f"{Path(path).name} row {number}"):
            yield row, part
            row += 1


def stored_rows(path: str | Path) -> Generator[tuple[int, dict | BadSample]]:
    """Rows of a file as (row number from 0, record or what is wrong with the row). Raises DataError.

    Memory stays small whatever the file's size. A broken line of JSON Lines costs that row; inside a JSON list nothing
    tells where the next row begins, so there it is a DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data.sources.path={path} is not a file; {HELP}")
    with open(path, "rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        yield from _read_parquet(path)
        return
    openers: list[Any] = [opener for magic, opener in COMPRESSED.items() if head.startswith(magic)]
    opener = openers[0] if openers else open
    try:
        with opener(path, "rb") as stream:
            yield from _read_json(path, stream)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"data.sources.path={path} is damaged or cut off ({error}); compress it again") from None
    except OSError as error:  # bz2 has no class of its own
        raise DataError(f"data.sources.path={path} cannot be read ({error})") from None


def _read_json(path: Path, stream) -> Iterator[tuple[int, dict | BadSample]]:
    head = stream.read(1 << 16)
    for (offset, magic), what in FOREIGN.items():
        if head[offset:].startswith(magic):
            raise DataError(f"data.sources.path={path} is {what}")
    stream.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:1] == b"[" and (text[1:].lstrip()[:1] in (b"{", b"]", b"") or path.suffix == ".json"):
        return Values(path, stream).of_list()
    if text.split(b"\n", 1)[0].strip() == b"{":  # objects over several lines each
        return Values(path, stream).one_after_the_other()
    return _read_lines(path, stream)


def _read_lines(path: Path, stream) -> Iterator[tuple[int, dict | BadSample]]:
    row = 0
    for line in stream:
        if not line.strip():
            continue
        try:
            yield row, json.loads(line.decode("utf-8", "surrogateescape"), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            yield row, BadSample("invalid JSON", f"{path.name} row {row}: not valid JSON ({error}); fix or remove it")
        row += 1


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; of a key that it has twice, json would drop the first value without a word."""
    record = dict(pairs)
    if len(record) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        record[f"{twice} (given twice)"] = True  # a key that no row may have
    return record


class Values:
    """Walks JSON values in a stream, with a window that grows to the largest of them."""

    def __init__(self, path: Path, stream):
        self.path, self.stream = path, stream
        self.decoder = json.JSONDecoder(object_pairs_hook=_object)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.buffer, self.position, self.row, self.ended = "", 0, 0, False

    def of_list(self) -> Iterator[tuple[int, dict]]:
        """(row number, record) of each element of a JSON list. DataError for what is no list of rows."""
        self._peek()
        self.position += 1  # the opening bracket
        while self._peek() != "]":
            if self.row and self.buffer[self.position] == ",":
                self.position += 1
                self._peek()
            yield self._next()
            if self._peek() not in ",]":
                found = self.buffer[self.position]
                raise DataError(f"{self.path} row {self.row - 1}: expected ',' or ']' after the row, found {found!r}")
        self.position += 1
        if self._more():
            found = self.buffer[self.position : self.position + 20]
            raise DataError(
                f"{self.path}: more follows after the JSON list and its {self.row} rows: {found!r}; nothing of it would "
                "be read: join the lists into one, or write JSON Lines"
            )

    def one_after_the_other(self) -> Iterator[tuple[int, dict]]:
        """(row number, record) of JSON values that merely follow each other."""
        while self._more():
            yield self._next()

    def _grow(self) -> bool:
        if self.ended or len(self.buffer) - self.position > MAX_ROW:
            return False
        chunk = self.stream.read(CHUNK)
        self.ended = len(chunk) < CHUNK
        self.buffer, self.position = self.buffer[self.position :] + self.utf8.decode(chunk, final=self.ended), 0
        return True

    def _more(self) -> bool:
        """Go to the next character that is not blank, if there is one."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.buffer):
                return True
            if not self._grow():
                return False

    def _peek(self) -> str:
        if not self._more():
            raise DataError(f"{self.path}: the JSON list ends early, after row {self.row - 1}; the file is cut off")
        return self.buffer[self.position]

    def _next(self) -> tuple[int, dict]:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
                if end < len(self.buffer) or self.ended:
                    break
                error = None
            except (ValueError, RecursionError) as failure:
                error = failure
            if not self._grow():
                where = f"{self.path} row {self.row}"
                raise DataError(f"{where}: not valid JSON ({error}); repair the file or write it as JSON Lines")
        self.position = end
        self.row += 1
        return self.row - 1, value


def _read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    if importlib.util.find_spec("pyarrow") is None:  # only for this format
        raise DataError(
            f"data.sources.path={path} is Parquet: `pip install pyarrow` to read it as it is, or write it as JSON Lines "
            "(`datasets.Dataset.from_parquet(...).to_json(...)`)"
        )
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(PARQUET_ROWS)
        yield from enumerate(_plain(record) for batch in batches for record in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data.sources.path={path} cannot be read as Parquet ({error})") from None


def _plain(value):
    """What JSON can hold: a column's empty fields are left out, bytes are pictures."""
    if isinstance(value, bytes):
        return "data:;base64," + base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
