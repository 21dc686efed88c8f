"""Puts a benchmark's questions to a generation engine, then scores the answers.

The engine is whatever has `generate`: it takes requests, batches them as it likes, and yields answers in any order.
predictions.py keeps each answer as soon as it comes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from megatron_moellava.data.placeholders import in_places
from megatron_moellava.data.sample import Turn
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.judge import Judge
from megatron_moellava.evaluation.metrics import BOOTSTRAP_SAMPLES
from megatron_moellava.evaluation.predictions import (
    ALONE,
    Given,
    Place,
    Predictions,
    RunIdentity,
    digest,
    read_predictions,
)
from megatron_moellava.evaluation.questions import Picture, Question
from megatron_moellava.evaluation.report import score_and_submit, write_record
from megatron_moellava.evaluation.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One conversation to be continued by the model."""

    id: str
    turns: tuple[Turn, ...]  # the last one is the user's; data.templates renders them into the prompt
    images: tuple[Picture, ...]  # one for each placeholder in the turns, in order within each kind
    max_new_tokens: int
    image_aspect_ratio: str  # "model": as the model was trained; "square": resize and crop alone
    temperature: float = 0.0  # 0: greedy


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The model's answer to a request."""

    request_id: str
    text: str  # without the prompt and the stop string
    regions: tuple[dict, ...] = ()  # the places it names (data.regions.Located), where the engine knows the pictures


class Engine(Protocol):
    """What answers: a checkpoint, or any stand-in with the same method."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Exactly one answer per request, in any order, each as soon as it is finished."""


def make_request(task: Task, question: Question, temperature: float = 0.0) -> Request:
    """The user's turn is "<image>\\n" + question + suffix, as in the original; without a picture, no placeholder.

    A text that places its pictures itself stays as it is.
    """
    pictures = question.pictures
    placed = pictures and in_places(question.text, [picture.placeholder for picture in pictures]) is not None
    placeholder = "" if placed else "".join(f"{picture.placeholder}\n" for picture in pictures)
    return Request(
        id="#".join(map(str, question.key)),
        turns=(Turn(role="user", text=placeholder + question.text + task.suffix),),
        images=pictures,
        max_new_tokens=task.max_new_tokens,
        image_aspect_ratio=task.image_aspect_ratio,
        temperature=temperature,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a benchmark is asked and its error estimated."""

    limit: int = 0  # first questions only; 0: all
    circular: bool = False  # MMBench: every question once per rotation of its options
    blank_images: bool = False  # grey pictures, for the check that they matter
    temperature: float = 0.0
    bootstrap_samples: int = BOOTSTRAP_SAMPLES
    progress: bool = True


DEFAULTS = Options()


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A benchmark's questions: all, and those to be asked."""

    all: Sequence[Question]  # of the file
    chosen: Sequence[Question]  # after --limit, with blank pictures if so asked


def read_questions(task: Task, data: Path, options: Options, *, asking: bool = True) -> Asked:
    """The questions of a task. `asking`: its pictures must be there too. Raises DataError."""
    questions = task.read(data, circular=options.circular, asking=asking)
    return Asked(all=questions, chosen=chosen_of(questions, options))


def chosen_of(questions: Sequence[Question], options: Options) -> Sequence[Question]:
    """The first `limit`, and with grey pictures if so asked."""
    chosen = questions[: options.limit] if options.limit else questions
    if not options.blank_images:
        return chosen
    return [
        replace(q, picture=replace(q.picture, blank=True), more=tuple(replace(more, blank=True) for more in q.more))
        if q.picture
        else q
        for q in chosen
    ]


def answer(
    task: Task,
    questions: Sequence[Question],
    predictions: Predictions,
    engine: Engine,
    *,
    progress: bool = True,
) -> None:
    """Asks what is still unanswered and merges. Every process of the run calls it, with the same questions."""
    place = predictions.place
    todo = predictions.missing(questions)
    place.barrier()  # nobody writes before all have read what is left, else the shares would differ
    if todo:
        _ask(task, todo[place.rank :: place.world_size], predictions, engine, progress=progress and place.leads)
    place.barrier()
    if place.leads:
        predictions.merge(questions)
    place.barrier()


def _ask(task: Task, share: Sequence[Question], predictions: Predictions, engine: Engine, *, progress: bool) -> None:
    """Also without a question of its own, a process calls the engine: its experts may serve the others' tokens."""
    requests = [make_request(task, question, predictions.identity.temperature) for question in share]
    pending = dict(zip((request.id for request in requests), zip(share, requests, strict=True), strict=True))
    bar = tqdm(engine.generate(requests), total=len(requests), desc=task.title, unit="question", disable=not progress)
    with predictions.writer() as write:
        for given in bar:
            assert given.request_id in pending, f"{given.request_id!r} was not asked or is answered already"
            question, request = pending.pop(given.request_id)
            prompt = request.turns[-1].text if task.logs_turn else question.text
            found = {"regions": list(given.regions)} if task.locates else {}
            write(question, prompt, given.text.strip(), found)
    assert not pending, f"the engine left {len(pending)} of {len(requests)} requests unanswered, first {min(pending)!r}"


def evaluate(
    task: Task,
    data: Path,
    out: Path,
    engine: Engine,
    *,
    model: str,
    judge: Judge | None = None,
    place: Place = ALONE,
    options: Options = DEFAULTS,
) -> dict | None:
    """Asks, scores and writes one benchmark into out/<name>. The record on the leading rank, None on the others."""
    asked = read_questions(task, data, options)
    identity = RunIdentity(
        benchmark=task.name,
        model=model,
        temperature=options.temperature,
        circular=options.circular,
        blank_images=options.blank_images,
        questions=digest(asked.all, task.suffix),
    )
    predictions = Predictions(out / task.name, identity, place)
    answer(task, asked.chosen, predictions, engine, progress=options.progress)
    if not place.leads:
        return None
    return _score(task, data, out, model, asked.chosen, predictions.of(asked.chosen), judge, options)


def score_file(
    task: Task, data: Path, out: Path, file: Path, *, model: str, judge: Judge | None, options: Options
) -> dict:
    """Scores a predictions file, ours or the original's, without a model."""
    chosen = read_questions(task, data, options, asking=False).chosen
    return _score(task, data, out, model, chosen, read_predictions(file, chosen), judge, options)


def _score(task, data, out, model, questions, given: Sequence[Given], judge, options) -> dict:
    answered = Answered(
        folder=data / task.folder,
        work=out / task.name,
        name=model,
        questions=questions,
        texts=[answer.text for answer in given],
        metadata=[answer.metadata for answer in given],
        judge=judge,
    )
    record = score_and_submit(task, answered, bootstrap_samples=options.bootstrap_samples)
    if options.blank_images:
        record["notes"].append("blank pictures: what the model answers without seeing")
    write_record(out / task.name, record)
    return record
