"""LLaVA records on disk -> `Sample`.

A record is {"id", "image": name or names, "conversations": [{"from": "human"|"gpt", "value": text}, ...]}, with
`video` in place of `image` where there is one, and an optional `tag` (question type, for metrics). Whatever is wrong
with a record becomes one `BadSample` that names the row and the way out; nothing is repaired in silence and no other
sample takes its place (the original replaces a broken sample by a random one).
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.config import DataError

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
CHUNK = 1 << 24  # characters held while walking a JSON list; a single row must fit in MAX_ROW
MAX_ROW = 1 << 27


class BadSample(DataError):
    """One unusable sample. `reason` is the counter it goes to."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):  # crosses process boundaries with its reason
        return type(self), (self.reason, str(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    role: str  # "user" or "assistant"
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    name: str  # path below the image folder, or a data: URI
    data: bytes | None = None  # the file itself, when it came from a tar
    frame: tuple[int, int] | None = None  # (i, n): the i-th of n frames spread evenly over a video


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    id: str
    origin: str  # "train.json row 17", for messages
    turns: tuple[Turn, ...]  # user and assistant alternate, user first
    images: tuple[ImageRef, ...] = ()  # one per `<image>` in the turns, in that order
    leading: str = ""  # an answer before the first question: of the original's templates only `v0` keeps it
    tag: str = ""
    notes: tuple[str, ...] = ()  # what is odd about it, for the counters


def parse_record(record: dict, *, origin: str, max_images: int = 16, video_frames: int = 8) -> Sample:
    """Check one record; raises BadSample."""
    if not isinstance(record, dict):
        raise BadSample("not a record", f"{origin}: a row must be a JSON object, found {type(record).__name__}")
    turns, notes = _parse_turns(record.get("conversations"), origin)
    images, turns = _parse_images(record, turns, origin, video_frames)
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != len(images):
        raise BadSample(
            "image count",
            f"{origin}: {placeholders} `<image>` in the conversation but {len(images)} in the `image` field; "
            "write one `<image>` per image, in order",
        )
    if len(images) > max_images:
        raise BadSample(
            "too many images", f"{origin}: {len(images)} images, more than data.max_images={max_images}; raise it"
        )
    return Sample(
        id=str(record.get("id", origin)),
        origin=origin,
        turns=turns,
        images=images,
        leading=_leading(record),
        tag=str(record.get("tag", "")),
        notes=notes,
    )


def _leading(record: dict) -> str:
    first = (record.get("conversations") or record.get("messages"))[0]
    if ROLES.get(first.get("from", first.get("role"))) != "assistant":
        return ""
    text = first.get("value", first.get("content"))
    return text if isinstance(text, str) else ""


def _parse_turns(conversations, origin: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """(turns, notes)"""
    if not isinstance(conversations, list) or not conversations:
        raise BadSample("no conversation", f"{origin}: `conversations` must be a non-empty list of turns")
    turns, notes = [], []
    for number, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadSample("malformed turn", f"{origin}: turn {number} must be an object with `from` and text `value`")
        speaker = turn.get("from")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadSample("unknown role", f"{origin}: turn {number} is from {speaker!r}; use 'human' or 'gpt'")
        if number == 0 and role == "assistant":
            notes.append("leading answer dropped")  # as in the original
            continue
        turns.append(Turn(role=role, text=_utf8(turn["value"], f"{origin}, turn {number}")))
    if any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise BadSample(
            "roles do not alternate", f"{origin}: turns must alternate human, gpt, human, gpt; found a repetition"
        )
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not any(answers):
        raise BadSample("empty answer", f"{origin}: no answer to learn from; remove the row or fill the gpt turn")
    return tuple(turns), (*notes, *(["empty answer among others"] if "" in answers else []))


def _parse_images(record: dict, turns: tuple[Turn, ...], origin: str, video_frames: int):
    names = _names(record.get("image"), "image", origin)
    videos = _names(record.get("video"), "video", origin)
    if not videos:
        return tuple(ImageRef(name=name) for name in names), turns
    if names:
        raise BadSample("image and video", f"{origin}: has both `image` and `video`; split it into two rows")
    text = [turn.text.replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER * video_frames) for turn in turns]
    turns = tuple(Turn(role=turn.role, text=new) for turn, new in zip(turns, text, strict=True))
    frames = (ImageRef(name=name, frame=(i, video_frames)) for name in videos for i in range(video_frames))
    return tuple(frames), turns


def _names(value, key: str, origin: str) -> list[str]:
    if value is None or value == "":
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise BadSample("malformed image field", f"{origin}: `{key}` must be a name or a list of names")
    return [_utf8(name, origin) for name in names]


def _utf8(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: the file held bytes that are not UTF-8
        raise BadSample("invalid UTF-8", f"{where}: text is not valid UTF-8; re-encode the file") from None
    return text


def read_rows(path: str | Path) -> Iterator[tuple[int, dict | BadSample]]:
    """Rows of a JSON list or a JSONL file as (row number from 0, record or what is wrong with the row).

    Memory stays small whatever the file's size. A broken JSONL line costs that row; inside a JSON list nothing tells
    where the next row begins, so there it is a DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data.sources.path={path} is not a file; give a LLaVA JSON or JSONL file")
    with open(path, "rb") as stream:
        first = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        stream.seek(3 if stream.seek(0) == 0 and stream.read(3) == codecs.BOM_UTF8 else 0)
        is_list = first.startswith(b"[") and path.suffix != ".jsonl"  # a broken first line may start with anything
        yield from _read_list(path, stream) if is_list else _read_lines(path, stream)


def _read_lines(path: Path, stream) -> Iterator[tuple[int, dict | BadSample]]:
    row = 0
    for line in stream:
        if not line.strip():
            continue
        try:
            yield row, json.loads(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            yield row, BadSample("invalid JSON", f"{path.name} row {row}: not valid JSON ({error}); fix or remove it")
        row += 1


def _read_list(path: Path, stream) -> Iterator[tuple[int, dict | BadSample]]:
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    buffer, position, row, ended = "", 0, 0, False

    def grow() -> bool:
        nonlocal buffer, position, ended
        if ended or len(buffer) - position > MAX_ROW:
            return False
        chunk = stream.read(CHUNK)
        ended = len(chunk) < CHUNK
        buffer, position = buffer[position:] + utf8.decode(chunk, final=ended), 0
        return True

    def peek() -> str:
        nonlocal position
        while True:
            while position < len(buffer) and buffer[position] in " \t\r\n":
                position += 1
            if position < len(buffer):
                return buffer[position]
            if not grow():
                raise DataError(f"{path}: the JSON list ends early, after row {row - 1}; the file is cut off")

    peek()
    position += 1  # the opening bracket
    while peek() != "]":
        if row and buffer[position] == ",":
            position += 1
            peek()
        while True:
            try:
                value, end = decoder.raw_decode(buffer, position)
                if end < len(buffer) or ended:
                    break
                error = None
            except (ValueError, RecursionError) as failure:
                error = failure
            if not grow():
                raise DataError(f"{path} row {row}: not valid JSON ({error}); repair the file or write it as JSONL")
        position = end
        yield row, value
        row += 1
        if peek() not in ",]":
            raise DataError(f"{path} row {row - 1}: expected ',' or ']' after the row, found {buffer[position]!r}")
