"""The answers of one benchmark on disk, kept so that a run may stop at any moment and go on.

Each data-parallel rank appends to its own part file. A new start, with the same or another number of ranks, asks only
what no part file answers. When all is answered, the leading rank merges the parts in the question file's order into
predictions.jsonl, in the original's columns, so that the original's scripts read it too.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_moellava.config import ConfigError, DataError
from megatron_moellava.evaluation.questions import Question, read_json, read_jsonl

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process among the others that answer the same benchmark; the default is to be alone."""

    rank: int = 0  # data-parallel rank: which share of the questions
    world_size: int = 1
    writes: bool = True  # False on all but one rank of a model-parallel group: they only take part in the forward pass
    barrier: Callable[[], None] = lambda: None  # waits for every process of the run

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is only one of."""
        return self.rank == 0 and self.writes


ALONE = Place()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """What all answers of a folder have in common; a folder never mixes two."""

    benchmark: str
    model: str
    temperature: float
    circular: bool
    blank_images: bool
    questions: str  # digest of the ids and words of all questions


def digest(questions: Sequence[Question], suffix: str = "") -> str:
    """Of the ids and words of all questions: a changed question file must not be mixed with answers to the old one."""
    hashed = hashlib.sha256()
    for question in questions:
        hashed.update("\0".join((*question.key[:1], str(question.round), question.text + suffix, "")).encode())
    return hashed.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Given:
    """One answer as a predictions file has it."""

    text: str
    metadata: dict  # {"regions": places it names, in pixels}, or empty


class Predictions:
    """The answers of one benchmark's folder: run.json, predictions.jsonl and, while a run lasts, one part per rank."""

    def __init__(self, folder: Path, identity: RunIdentity, place: Place) -> None:
        self.folder, self.identity, self.place = folder, identity, place
        folder.mkdir(parents=True, exist_ok=True)
        self._check_identity()
        self._keep({key: row for path in self._files() for key, row in _read_part(path)})

    def _keep(self, rows: dict[tuple[str, int], dict]) -> None:
        self.texts = {key: row["text"] for key, row in rows.items()}
        self.metadata = {key: row.get("metadata") or {} for key, row in rows.items()}

    def of(self, questions: Sequence[Question]) -> list["Given"]:
        """The answers to these questions, in their order."""
        return [Given(self.texts[question.key], self.metadata[question.key]) for question in questions]

    def _check_identity(self) -> None:
        path = self.folder / "run.json"
        if path.exists():
            before = read_json(path)
            for name, value in asdict(self.identity).items():
                if before.get(name) != value:
                    raise ConfigError(
                        f"{self.folder} holds answers with {name}={before.get(name)!r}, this run has {name}={value!r}; "
                        f"use another --out or delete the folder"
                    )
        elif self.place.leads:
            _write_atomically(path, json.dumps(asdict(self.identity), indent=1))

    def _files(self) -> list[Path]:
        parts = sorted(self.folder.glob("predictions.part*.jsonl"))
        return [path for path in (self.folder / "predictions.jsonl", *parts) if path.exists()]

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """The questions that have no answer yet, in their order."""
        return [question for question in questions if question.key not in self.texts]

    @contextmanager
    def writer(self) -> Iterator[Callable[[Question, str, str, dict], None]]:
        """Appends one flushed row per call, so that a killed process loses at most the row it was writing."""
        if not self.place.writes:
            yield lambda question, prompt, text, metadata: None
            return
        with (self.folder / f"predictions.part{self.place.rank:05d}.jsonl").open(
            "a", encoding="utf-8", buffering=1
        ) as file:

            def write(question: Question, prompt: str, text: str, metadata: dict) -> None:
                row = _row(question, prompt, text, self.identity.model, metadata)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

            yield write

    def merge(self, questions: Sequence[Question]) -> None:
        """All answers in the questions' order into one file; the parts go. Answers beyond these questions stay too.

        Raises DataError when one is missing.
        """
        rows = {key: row for path in self._files() for key, row in _read_part(path)}
        self._keep(rows)
        if missing := self.missing(questions):
            raise DataError(
                f"{self.folder}: {len(missing)} of {len(questions)} answers are missing, first {missing[0].key}; "
                f"with several nodes --out must lie on a shared file system"
            )
        ordered = [question.key for question in questions]
        asked = set(ordered)
        ordered += [key for key in rows if key not in asked]
        parts = [path for path in self._files() if "part" in path.name]
        text = "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in ordered)
        _write_atomically(self.folder / "predictions.jsonl", text)
        for path in parts:
            path.unlink()


def _row(question: Question, prompt: str, text: str, model: str, metadata: dict) -> dict:
    """The original's columns, and the round where the id alone would not tell which question was answered."""
    row: dict[str, object] = {"question_id": question.id}
    if question.round or "option_char" in question.fields:
        row["round_id"] = question.round
    if "option_char" in question.fields:
        row |= {name: list(question.fields[name]) for name in ("options", "option_char")}
    answer_id = hashlib.sha256("\0".join((*map(str, question.key), text)).encode()).hexdigest()[:22]
    return row | {"prompt": prompt, "text": text, "answer_id": answer_id, "model_id": model, "metadata": metadata}


def _read_part(path: Path) -> Iterator[tuple[tuple[str, int], dict]]:
    drop_torn_line(path)
    return _keyed_rows(path)


def drop_torn_line(path: Path) -> None:
    """A process killed while writing leaves half a line without its line break: it is cut off, and asked again."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        logger.warning("%s: dropped an unfinished last line", path)
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_predictions(path: Path, questions: Sequence[Question]) -> list[Given]:
    """Answers from a predictions file, ours or the original's, one per question. DataError when some are missing."""
    texts = {key: Given(str(row["text"]), row.get("metadata") or {}) for key, row in _keyed_rows(path)}
    missing = [question for question in questions if question.key not in texts]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} of {len(questions)} answers, first question {missing[0].id} round "
            f"{missing[0].round}; finish the run, or score its part with --limit"
        )
    return [texts[question.key] for question in questions]


def _keyed_rows(path: Path) -> Iterator[tuple[tuple[str, int], dict]]:
    """Rows with the key of their question. Where the original wrote no round, the n-th row of an id is round n - 1."""
    seen: Counter = Counter()
    for row in read_jsonl(path):
        if "question_id" not in row or "text" not in row:
            raise DataError(f"{path}: a row lacks question_id or text; it has {sorted(row)}")
        id_ = str(row["question_id"])
        if "round_id" not in row:
            yield (id_, seen[id_]), row
            seen[id_] += 1
        else:
            yield (id_, int(row["round_id"])), row
