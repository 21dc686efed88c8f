"""Yes or no about a picture: POPE (is the object there?) and MME (fourteen subtasks of two questions per picture)."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_moellava.config import DataError
from megatron_moellava.evaluation import normalise
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.metrics import Confusion, Score, answers_yes, sum_by_unit
from megatron_moellava.evaluation.questions import Question, read_jsonl

POPE_CATEGORIES = ("adversarial", "popular", "random")
MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_SUBTASKS = MME_PERCEPTION + MME_COGNITION
_SHORT_ANSWER = "Answer the question using a single word or phrase."
_YES_OR_NO = "Please answer yes or no."


# Confusion.add writes into these four, in this order, once per category.
_CELLS = ("true_positive", "false_positive", "true_negative", "false_negative")


def pope(answered: Answered) -> Score:
    """Mean F1 of the three categories, times 100: the paper's column. Labels are POPE's own coco_pope_*.json.

    The original pairs the n-th answer of a category with the n-th label. So do we, but an answer whose picture is not
    the label's is an error here, where the original would score the wrong pairs in silence.
    Raises DataError for another category.
    """
    by_category: dict[str, list[tuple[Question, str]]] = defaultdict(list)
    for question, text in answered:
        by_category[str(question.fields["category"])].append((question, text))
    if unknown := sorted(set(by_category) - set(POPE_CATEGORIES)):
        raise DataError(f"category={unknown[0]!r} in the POPE questions: must be one of {', '.join(POPE_CATEGORIES)}")
    rows, published = [], 0
    for category in POPE_CATEGORIES:
        labels = list(read_jsonl(answered.folder / "coco" / f"coco_pope_{category}.json"))
        published += len(labels)
        for (question, text), label in _pair(by_category[category], labels, category):
            rows.append((question, text, label["label"] != "no"))
    return _pope_score(rows, answered.note_subset(published))


def quickstart_pope(answered: Answered) -> Score:
    """The same numbers on the quickstart's pictures; the questions bring their truths (see quickstart_pope.py)."""
    rows = [(question, text, question.fields["answer"] != "no") for question, text in answered]
    return _pope_score(
        rows, ["POPE's protocol on the quickstart's pictures, not POPE's questions; always yes: F1 66.7"]
    )


def _pope_score(rows: Sequence[tuple[Question, str, bool]], notes: Sequence[str]) -> Score:
    """Rows of (question, what was said, whether yes is right)."""
    sums = []
    for question, text, truth in rows:
        cell = Confusion()
        cell.add(predicted=answers_yes(text), truth=truth)
        row = np.zeros((len(POPE_CATEGORIES), len(_CELLS)))
        row[POPE_CATEGORIES.index(question.fields["category"])] = [getattr(cell, name) for name in _CELLS]
        sums.append(row.ravel().tolist())
    sums_UK = sum_by_unit([question.fields["image"] for question, *_ in rows], sums)
    return Score(
        metric="mean F1 of the three categories (%)",
        sums_UK=sums_UK,
        headline=_mean_f1,
        count=len(rows),
        details=_pope_categories(sums_UK.sum(axis=0)),
        notes=notes,
    )


def _pair(answers: list[tuple[Question, str]], labels: list[dict], category: str):
    if len(answers) > len(labels):
        raise DataError(
            f"POPE {category}: {len(answers)} answers but {len(labels)} labels; fetch the coco folder again"
        )
    for answer, label in zip(answers, labels, strict=False):
        image = Path(str(answer[0].fields["image"])).name
        if "image" in label and image != Path(label["image"]).name:
            raise DataError(f"POPE {category}: question {answer[0].id} shows {image}, its label {label['image']}")
        yield answer, label


def _pope_categories(sums_K: np.ndarray) -> dict[str, dict[str, float]]:
    cells = sums_K.reshape(len(POPE_CATEGORIES), len(_CELLS))
    asked = [number for number in range(len(POPE_CATEGORIES)) if cells[number].any()]
    return {POPE_CATEGORIES[number]: Confusion(*map(float, cells[number])).percent() for number in asked}


def _mean_f1(sums_K: np.ndarray) -> float:
    scores = [category["f1"] for category in _pope_categories(sums_K).values()]
    return sum(scores) / len(scores)


def mme(answered: Answered) -> Score:
    """Perception score (the paper's column; 2000 at most); cognition (800) and each subtask are in the details.

    A subtask's score is 100 * (accuracy + share of pictures with both questions right).
    Raises DataError for an id of no subtask.
    """
    truths = read_mme_truths(answered.folder / "MME_Benchmark_release_version")
    pictures: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for question, text in answered:
        category, _, file = str(question.id).partition("/")
        if category not in MME_SUBTASKS:
            raise DataError(f"question_id={question.id!r}: must start with an MME subtask ({', '.join(MME_SUBTASKS)})")
        stem = file.split("/")[-1].split(".")[0]
        truth = _mme_truth(truths, category, stem, question.text)
        pictures[category, stem].append(normalise.mme(text) == truth.lower())
    rows = []
    for (category, _), right in pictures.items():
        row = np.zeros((len(MME_SUBTASKS), 4))
        row[MME_SUBTASKS.index(category)] = (sum(right), len(right), float(len(right) == 2 and all(right)), 1.0)
        rows.append(row.ravel())
    sums_UK = np.array(rows)
    return Score(
        metric="perception score (of 2000)",
        sums_UK=sums_UK,
        headline=lambda sums_K: sum(_mme_subtasks(sums_K, MME_PERCEPTION).values()),
        count=len(answered),
        details=_mme_details(sums_UK.sum(axis=0)),
        notes=answered.note_subset(len(truths)),
    )


def read_mme_truths(folder: Path) -> dict[tuple[str, str, str], str]:
    """(subtask, picture, question) -> "Yes" or "No"; some subtasks keep the text files in questions_answers_YN/.

    Raises DataError when there is none.
    """
    truths = {}
    for category in MME_SUBTASKS:
        texts = folder / category / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else folder / category).glob("*.txt")):
            for line in path.read_text(encoding="utf-8").splitlines():
                question, tab, answer = line.strip().partition("\t")
                if tab:
                    truths[category, path.stem, question] = answer.strip()
    if not truths:
        raise DataError(f"{folder} holds no SUBTASK/*.txt with questions and answers; unpack MME's release there")
    return truths


def _mme_truth(truths: dict, category: str, stem: str, prompt: str) -> str:
    """The prompt lost its "Please answer yes or no." on the way; some files have two blanks before it."""
    question = prompt.replace(_SHORT_ANSWER, "").strip()
    for candidate in (question, f"{question} {_YES_OR_NO}", f"{question}  {_YES_OR_NO}"):
        if (category, stem, candidate) in truths:
            return truths[category, stem, candidate]
    raise DataError(f"MME {category}/{stem}: no truth for {question!r}; llava_mme.jsonl and the release do not match")


def _mme_subtasks(sums_K: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    scores = {}
    for name in names:
        right, questions, both, images = sums_K.reshape(len(MME_SUBTASKS), 4)[MME_SUBTASKS.index(name)]
        if questions:
            scores[name] = float(100.0 * (right / questions + both / images))
    return scores


def _mme_details(sums_K: np.ndarray) -> dict[str, object]:
    perception, cognition = (_mme_subtasks(sums_K, names) for names in (MME_PERCEPTION, MME_COGNITION))
    return {
        "perception": sum(perception.values()),
        "cognition": sum(cognition.values()),
        "subtasks": perception | cognition,
    }
