"""An option's letter: ScienceQA, SEED-Bench, and MMBench as far as its published answers go."""

import re
from collections import defaultdict
from collections.abc import Iterable

from megatron_moellava.config import DataError
from megatron_moellava.evaluation import normalise
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.choice_questions import LETTERS
from megatron_moellava.evaluation.metrics import Score, mean_percent, sum_by_unit
from megatron_moellava.evaluation.questions import Question, is_missing, read_json

_LETTERS = "ABCDE"
_IN_BRACKETS = re.compile(r"\s*\(([A-J])\)")
_ALONE = re.compile(r"\s*([A-J])(?:[.):,]|\s*$)")
_COPY = 1_000_000  # MMBench's index of a rotated copy is the first one's plus a multiple of this


def _accuracy(right: Iterable[float]) -> float:
    values = list(right)
    return 100.0 * sum(values) / len(values) if values else 0.0


def science_qa(answered: Answered) -> Score:
    """ScienceQA test: accuracy over the questions with a picture (IMG, the paper's column) and over all.

    Raises DataError when none has a picture, or files do not match.
    """
    problems = read_json(answered.folder / "problems.json")
    test = read_json(answered.folder / "pid_splits.json")["test"]
    right: dict[bool, list[float]] = {True: [], False: []}
    images: list[object] = []
    failed = 0
    for question, text in answered:
        if str(question.id) not in problems:
            raise DataError(f"ScienceQA question {question.id} is not in problems.json; the files do not match")
        problem = problems[str(question.id)]
        letter = normalise.option_letter(text)
        failed += not letter
        is_right = letter != "" and _LETTERS[: len(problem["choices"])].find(letter) == problem["answer"]
        right[question.picture is not None].append(float(is_right))
        if question.picture is not None:
            images.append(question.fields["image"])
    if not images:
        raise DataError("no ScienceQA question with a picture was asked: the IMG accuracy needs some; raise --limit")
    return Score(
        metric="IMG accuracy (%)",
        sums_UK=sum_by_unit(images, [(value, 1.0) for value in right[True]]),
        headline=mean_percent,
        count=len(images),
        details={
            "accuracy over all": _accuracy(right[True] + right[False]),
            "asked": len(answered),
            "unreadable": failed,
        },
        notes=answered.note_subset(len(test)),
    )


def seed(answered: Answered) -> Score:
    """SEED-Bench: the text must be the letter itself. Accuracy over all, over pictures, over video frames, per type.

    Raises DataError when the files do not match.
    """
    data = read_json(answered.folder / "SEED-Bench.json")
    truths = {str(row["question_id"]): row for row in data["questions"]}
    names = {number: name for name, number in data["question_type"].items()}
    right: list[float] = []
    groups: dict[str, list[float]] = defaultdict(list)
    for question, text in answered:
        if str(question.id) not in truths:
            raise DataError(f"SEED-Bench question {question.id} is not in SEED-Bench.json; the files do not match")
        truth = truths[str(question.id)]
        right.append(float(text == truth["answer"]))
        for group in (truth["data_type"], names[truth["question_type_id"]]):
            groups[group].append(right[-1])
    return Score(
        metric="accuracy (%)",
        sums_UK=sum_by_unit([question.fields["image"] for question in answered.questions], [(r, 1.0) for r in right]),
        headline=mean_percent,
        count=len(answered),
        details={group: _accuracy(part) for group, part in sorted(groups.items())},
        notes=answered.note_subset(len(truths)),
    )


def lettered(answered: Answered) -> Score:
    """Accuracy of questions whose options have letters (`truth`), over all and per group; the bootstrap draws questions."""
    right: list[float] = []
    unreadable = 0
    groups: dict[str, list[float]] = defaultdict(list)
    for question, text in answered:
        letter = _stated(text, question.fields["options"])
        unreadable += not letter
        right.append(float(letter == question.fields["truth"]))
        groups[question.fields["group"] or "all"].append(right[-1])
    return Score(
        metric="accuracy (%)",
        sums_UK=sum_by_unit([question.key for question in answered.questions], [(value, 1.0) for value in right]),
        headline=mean_percent,
        count=len(right),
        unit="question",
        details={group: _accuracy(part) for group, part in sorted(groups.items())} | {"unreadable": unreadable},
    )


def _stated(text: str, options: list[str]) -> str:
    """The letter that an answer begins with or states ("B", "B. a cat", "(B)"), or that of the option whose words it is."""
    if found := _IN_BRACKETS.match(text) or _ALONE.match(text):
        return found[1]
    if letter := normalise.option_letter(text):
        return letter
    said = text.strip().strip(".").lower()
    return next(
        (letter for letter, option in zip(LETTERS, options, strict=False) if option.strip(".").lower() == said), ""
    )


def mmbench(answered: Answered) -> Score | None:
    """A local stand-in for MMBench's server, on splits whose answers are published (dev); None for the others.

    Circular, as the server counts: a question is right when all its rotations are. The server also lets a language
    model match answers that hold no letter; here these are wrong, so this number is a lower bound.
    """
    if any(is_missing(str(question.fields.get("answer", ""))) for question in answered.questions):
        return None
    copies: dict[int, list[bool]] = defaultdict(list)
    first_right: list[float] = []
    for question, text in answered:
        is_right = _original_letter(question, normalise.option_letter(text)) == question.fields["answer"]
        copies[int(question.id) % _COPY].append(is_right)
        if question.round == 0 and int(question.id) < _COPY:
            first_right.append(float(is_right))
    circular = any(len(group) > 1 for group in copies.values())
    return Score(
        metric="circular accuracy (%)" if circular else "accuracy, one round (%)",
        sums_UK=sum_by_unit(list(copies), [(float(all(group)), 1.0) for group in copies.values()]),
        headline=mean_percent,
        count=len(answered),
        unit="question",
        details={"one round": _accuracy(first_right), "questions": len(copies)},
        notes=["local exact match, not the server's score" + ("" if circular else "; the server's is circular")],
    )


def _original_letter(question: Question, shown: str) -> str:
    """In a rotated round the options carry new letters; `option_char` lists the letter each one had in the file."""
    letters = str(question.fields["option_char"])
    place = _LETTERS.find(shown) if shown else -1
    return letters[place] if 0 <= place < len(letters) else ""
