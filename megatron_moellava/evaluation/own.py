"""Questions of one's own: any JSONL, asked without a benchmark, answers in the columns of the original's model_vqa.

A line is {"question_id", "image", "text"}, as model_vqa takes it. `image` may be left out or be a list; `video`, and a key for
each modality of the checkpoint (`data.modalities`), may stand beside or for it. An id that is left out is the line's number;
`question` or `prompt` may stand for `text`. What else a line holds is not asked.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.predictions import Place, Predictions, RunIdentity, digest
from megatron_moellava.evaluation.questions import Picture, Question, read_json, read_jsonl
from megatron_moellava.evaluation.runner import Engine, Options, answer, chosen_of
from megatron_moellava.evaluation.task import Task

KINDS = {"image": "pictures", "video": "videos"}
TEXTS = ("text", "question", "prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnQuestions:
    """What to ask, and how."""

    file: Path
    images: Path | None = None  # folder of the pictures; None: the file's own
    max_new_tokens: int = 1024
    image_aspect_ratio: str = "model"  # "model": as the model was trained; "square": unpadded, as model_vqa
    modalities: tuple[str, ...] = ()  # of the checkpoint, by name

    @property
    def task(self) -> Task:
        """The file as a benchmark that has no scorer."""
        return Task(
            name=self.file.stem,
            title=self.file.name,
            folder=".",
            questions=str(self.file),
            reader="",
            max_new_tokens=self.max_new_tokens,
            image_aspect_ratio=self.image_aspect_ratio,
            origin="--questions",
        )

    def read(self) -> list[Question]:
        """All questions in the file's order. DataError: nothing to ask, or pictures that are not there."""
        folder, seen, asked = self.images or self.file.parent, Counter[str](), []
        for number, row in enumerate(_rows(self.file)):
            where = f"{self.file} question {number + 1}"
            question = _question(row, number, folder, where, seen, self.modalities)
            seen[str(question.id)] += 1
            asked.append(question)
        if not asked:
            raise DataError(
                f"{self.file} holds no question; write one JSON object a line: {{question_id, image, text}}"
            )
        missing = [picture.path for question in asked for picture in question.pictures if not picture.is_there]
        if missing:
            raise DataError(
                f"{self.file}: {len(missing)} pictures are missing, first {missing[0]}; name their folder with "
                "--image-folder"
            )
        return asked


def _rows(file: Path) -> Iterator[dict]:
    """Of JSON lines, or of a JSON list."""
    if file.suffix == ".json":
        rows = read_json(file)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f"{file} must be a JSON list of objects, or JSON lines in a file that ends with .jsonl")
        return iter(rows)
    return read_jsonl(file)


def _question(
    row: dict, number: int, folder: Path, where: str, seen: Counter[str], modalities: tuple[str, ...]
) -> Question:
    name = next((name for name in TEXTS if name in row), None)
    if name is None or not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"{where}: `text` must hold the question; the line has {sorted(map(str, row))}")
    pictures: list[Picture] = []
    for kind in ("image", "video", *modalities):
        names = row.get(kind) or []
        names = names if isinstance(names, list) else [names]
        if not all(isinstance(item, str) for item in names):
            raise DataError(f"{where}: `{kind}` must be a file's name or a list of names, not {row[kind]!r}")
        placed = row[name].count(f"<{kind}>")
        if placed and names and placed != len(names):
            raise DataError(
                f"{where}: {placed} `<{kind}>` in the text for {len(names)} {KINDS.get(kind, kind)}; write one for each, or "
                "none: then they go first"
            )
        modality = kind if kind in modalities else ""
        pictures += [Picture(path=folder / item, video=kind == "video", modality=modality) for item in names]
    id_ = row.get("question_id", row.get("id", number))
    return Question(
        id=id_ if isinstance(id_, int | str) else str(id_),
        text=row[name],
        picture=pictures[0] if pictures else None,
        more=tuple(pictures[1:]),
        round=seen[str(id_)],
    )


def ask(
    own: OwnQuestions, out: Path, engine: Engine, *, model: str, place: Place, options: Options, answers: Path | None
) -> str:
    """Asks, and writes out/<name of the file>/predictions.jsonl, and `answers` if given. A line on the leading rank."""
    questions = own.read()
    chosen = chosen_of(questions, options)
    identity = RunIdentity(
        benchmark=f"questions {own.file.name}",
        model=model,
        temperature=options.temperature,
        circular=False,
        blank_images=options.blank_images,
        questions=_digest(own, questions),
    )
    predictions = Predictions(out / own.file.stem, identity, place)
    answer(own.task, chosen, predictions, engine, progress=options.progress)
    if not place.leads:
        return ""
    written = predictions.folder / "predictions.jsonl"
    if answers is not None:
        answers.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(written, answers)
    return f"{len(chosen)} questions of {own.file} are answered in {answers or written}\n"


def _digest(own: OwnQuestions, questions: Sequence[Question]) -> str:
    """Of the words, the pictures' names and what decides how they are asked: an answer to anything else is not reused."""
    asked = [own.image_aspect_ratio, own.max_new_tokens, *([str(path) for path in q.paths] for q in questions)]
    return f"{digest(questions)}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"
