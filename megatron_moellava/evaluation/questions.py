"""Question files as their benchmarks publish them (the layout of LLaVA's eval.zip), read into one form.

A reader turns a file into `Question`s and adds nothing: suffixes, image preparation and decoding belong to the task.
Pictures are not opened here; a `Picture` knows how, so that a hundred thousand questions stay light and the engine's
own workers decode.
"""

import base64
import binascii
import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_moellava.config import DataConfig, DataError, Modality
from megatron_moellava.data.images import open_image
from megatron_moellava.data.media import show_video
from megatron_moellava.data.quantities import open_picture
from megatron_moellava.data.sample import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

_MAX_TSV_FIELD = 1 << 26  # characters; MMBench keeps a whole base64 picture in one field
# What pandas.read_table takes for a missing value ("NA" is one, the sodium "Na" is not) ...
_PANDAS_MISSING = "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"
_MISSING = frozenset({"", *_PANDAS_MISSING.split("|")})
_LETTERS = "ABCD"
GREY = (127, 127, 127)  # of blank pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Where a picture comes from; `blank` keeps its size and shows uniform grey, for the check that it matters."""

    path: Path | None = None
    data: bytes = b""  # an encoded picture, when the question file carries it
    blank: bool = False
    video: bool = False  # `show` gives its frames
    modality: str = ""  # of data.modalities; "": a plain picture
    span: tuple[float, float] | None = None  # of a video: from and to, in seconds
    rate: float | None = None  # of a folder of frames: pictures per second, where that is known

    @property
    def placeholder(self) -> str:
        """What stands for it in a question's text."""
        if self.modality:
            return f"<{self.modality}>"
        return VIDEO_PLACEHOLDER if self.video else IMAGE_PLACEHOLDER

    @property
    def is_there(self) -> bool:
        """Whether its file exists; a video may be a folder of frames."""
        return self.path is None or self.path.is_file() or (self.video and self.path.is_dir())

    def show(self, data: DataConfig) -> tuple[str, tuple[Image.Image, ...]]:
        """(what the text says of it, one `<image>` for each picture; the pictures). Raises DataError."""
        if not self.video:
            return IMAGE_PLACEHOLDER, (self.open(data.modalities),)
        text, frames = show_video(str(self.path), str(self.path), data, self.span, self.rate)
        for frame in frames if self.blank else ():
            frame.paste(GREY, (0, 0, *frame.size))
        return text, tuple(frames)

    def open(self, modalities: Sequence[Modality] = ()) -> Image.Image:
        """An RGB picture. Raises DataError when it is missing or does not decode; `modalities`: those of the checkpoint."""
        source = self.data if self.path is None else str(self.path)
        where = str(self.path or "image in the question file")
        if not self.modality:
            picture, _ = open_image(source, where)
            return Image.new("RGB", picture.size, GREY) if self.blank else picture
        known = {modality.name: modality for modality in modalities}
        if self.modality not in known:
            raise DataError(
                f"{where}: is a picture of {self.modality!r}, and the checkpoint has learned of "
                f"{', '.join(known) or 'no modality'} (data.modalities); ask another checkpoint"
            )
        picture, _ = open_picture(source, known[self.modality], where)
        if self.blank:
            picture.paste(GREY, (0, 0, *picture.size))
        return picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question to the model, with what its scorer needs."""

    id: int | str
    text: str  # without <image> and without the suffix that the driver adds
    picture: Picture | None = None
    more: tuple[Picture, ...] = ()  # pictures after the first; the text may say with `<image>` where each goes
    round: int = 0  # tells apart questions of one id: MMBench's rotations of the options, a picture's several questions
    fields: Mapping[str, Any] = field(default_factory=dict)  # what the scorer needs of the row

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in order."""
        return (self.picture, *self.more) if self.picture else self.more

    @property
    def paths(self) -> tuple[Path, ...]:
        """Of the pictures that are files."""
        return tuple(picture.path for picture in self.pictures if picture.path is not None)

    @property
    def key(self) -> tuple[str, int]:
        """Identity across files: ids are numbers in some files and the same digits as text in others."""
        return str(self.id), self.round


def read_json(path: Path) -> Any:
    """A JSON file; DataError that names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); download it again") from error


def read_jsonl(path: Path) -> Iterator[dict]:
    """Rows of a JSON-lines file; DataError with the line number when a line is broken."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_row(line, path, number)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error


def _parse_row(line: str, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} is not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path} line {number} is {type(row).__name__}: must be a JSON object")
    return row


def field_of(row: Mapping, name: str, path: Path) -> Any:
    """row[name], or a DataError that says which fields the row has."""
    if name not in row:
        raise DataError(f"{path}: a row lacks the field {name!r}; it has {sorted(map(str, row))}")
    return row[name]


def read_llava_jsonl(questions: Path, images: Path) -> list[Question]:
    """{"question_id", "image", "text", "category"?} a line: VQAv2, GQA, VisWiz, TextVQA, POPE, MME, SEED, ...

    In TextVQA and MME all questions of a picture have the picture's id: the second one gets round 1, and so on.
    """
    seen: Counter = Counter()
    asked = []
    for row in read_jsonl(questions):
        id_ = field_of(row, "question_id", questions)
        picture = Picture(path=images / str(field_of(row, "image", questions)))
        text = str(field_of(row, "text", questions))
        asked.append(Question(id=id_, text=text, picture=picture, round=seen[str(id_)], fields=row))
        seen[str(id_)] += 1
    return asked


def read_science_qa(questions: Path, images: Path) -> list[Question]:
    """[{"id", "image"?, "conversations": [{"value": question}, ...]}]; rows without a picture are questions too.

    Raises DataError for other JSON.
    """
    rows = read_json(questions)
    if not isinstance(rows, list):
        raise DataError(f"{questions} holds {type(rows).__name__}: must be a JSON list of questions")
    return [
        Question(
            id=field_of(row, "id", questions),
            text=field_of(row, "conversations", questions)[0]["value"].replace("<image>", "").strip(),
            picture=Picture(path=images / row["image"]) if row.get("image") else None,
            fields={"image": row.get("image", "")},
        )
        for row in rows
    ]


def read_quickstart(questions: Path, images: Path) -> list[Question]:
    """{"question", "answer", "type", "image"} a line; the line number is the id where there is no `question_id`."""
    return [
        Question(
            id=row.get("question_id", number),
            text=str(field_of(row, "question", questions)),
            picture=Picture(path=images / row["image"]) if row.get("image") else None,
            fields={name: field_of(row, name, questions) for name in ("question", "answer", "type")}
            | {"image": row.get("image", "")},
        )
        for number, row in enumerate(read_jsonl(questions))
    ]


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated table with a header; quoted fields may hold line breaks.

    Raises DataError when it is missing or not readable.
    """
    csv.field_size_limit(_MAX_TSV_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable TSV ({error}); download it again") from error


def is_missing(value: str | None) -> bool:
    """... and what the original adds to that: "none" and "nan" in any case. Such an option ends the list."""
    return value is None or value in _MISSING or value.lower() in ("none", "nan")


def read_mmbench(questions: Path, images: Path) -> list[Question]:
    """MMBench's table, one round: hint, question and lettered options in one text; the picture is base64."""
    return [question for row in _mmbench_rows(questions) for question in _mmbench_rounds(row, questions, rounds=1)]


def read_mmbench_circular(questions: Path, images: Path) -> list[Question]:
    """The original's `all_rounds`: every question once per rotation of its options.

    Published tables may already contain rotated copies (index + k * 1,000,000): only the first of each is read.
    """
    rows = [row for row in _mmbench_rows(questions) if int(row["index"]) < 1_000_000]
    return [question for row in rows for question in _mmbench_rounds(row, questions, rounds=len(_LETTERS))]


def _mmbench_rows(questions: Path) -> list[dict[str, str]]:
    rows = read_tsv(questions)
    for name in ("index", "question", "image", "A", "B"):
        if rows:
            field_of(rows[0], name, questions)
    return rows


def _mmbench_rounds(row: Mapping[str, str], questions: Path, rounds: int) -> Iterator[Question]:
    options: list[str] = []
    for letter in _LETTERS:  # the first missing option ends the list, as in the original
        if is_missing(row.get(letter)):
            break
        options.append(row[letter])
    letters = list(_LETTERS[: len(options)])
    hint = "" if is_missing(row.get("hint")) else row["hint"] + "\n"
    picture = Picture(data=_decode_base64(row["image"], questions, row["index"]))
    kept = {name: value for name, value in row.items() if name not in ("image", "hint")}
    for number in range(min(rounds, len(options))):
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
        yield Question(
            id=int(row["index"]),
            text=hint + row["question"] + listed,
            picture=picture,
            round=number,
            fields=kept | {"option_char": "".join(letters), "options": tuple(options)},
        )
        options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def _decode_base64(text: str, path: Path, index: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{path}: image of index {index} is not base64 ({error})") from error


READERS = {
    "llava_jsonl": read_llava_jsonl,
    "science_qa": read_science_qa,
    "quickstart": read_quickstart,
    "mmbench": read_mmbench,
    "mmbench_circular": read_mmbench_circular,
}
