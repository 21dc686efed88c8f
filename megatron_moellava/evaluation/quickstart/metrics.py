"""Scores of the quickstart's held-out questions, and what they are worth without the picture.

A row is a plain dict: `question`, `answer` (the truth), `type` (say "shape", "color", "existence") and `prediction`
(what the model said). Answers are closed and short, so that accuracy is exact match after lower-casing and dropping the
final full stop. The existence questions are read as POPE reads them (metrics.answers_yes), with one difference: yes and
no count half each, whatever their numbers, because the F1 of an unbalanced set rewards the more frequent guess.

An accuracy means little unless it stands beside two others: the question-only baseline (the most frequent training
answer to the same words) and the trained model shown blank pictures, which should fall to that baseline.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.metrics import Confusion, answers_yes

Row = Mapping[str, object]


def is_existence(kind: object) -> bool:
    """The types "existence" and "digits existence" ask whether something is there."""
    return str(kind).endswith("existence")


def normalise(text: object) -> str:
    """`" Yes. "` -> `"yes"`; a question loses its mark and repeated blanks, so that wording alone decides."""
    return re.sub(r"\s+", " ", str(text).strip().lower()).rstrip(" .?!")


def _is_right(row: Row) -> bool:
    return normalise(row["prediction"]) == normalise(row["answer"])


def _percent(rows: Sequence[Row]) -> float:
    return 100.0 * sum(map(_is_right, rows)) / len(rows)


def standard_error(rows: Sequence[Row]) -> float:
    """Binomial standard error of the accuracy, in percent points; questions are taken as independent."""
    share = _percent(rows) / 100.0
    return 100.0 * math.sqrt(share * (1.0 - share) / len(rows))


def score_existence(rows: Sequence[Row]) -> dict:
    """POPE's five numbers in percent, with yes and no weighted to half each; `unclear` answers are in neither word.

    Raises DataError for an answer that is neither yes nor no.
    """
    truths = [normalise(row["answer"]) for row in rows]
    if wrong := sorted(set(truths) - {"yes", "no"}):
        raise DataError(f"answer={wrong[0]!r} of an existence question: must be yes or no; fix the question file")
    counts = Counter(truths)
    confusion = Confusion()
    for row, truth in zip(rows, truths, strict=True):
        weight = 0.5 / counts[truth] if len(counts) == 2 else 1.0 / len(rows)
        confusion.add(predicted=answers_yes(str(row["prediction"])), truth=truth == "yes", weight=weight)
    unclear = sum(normalise(row["prediction"]) not in ("yes", "no") for row in rows)
    return {"count": len(rows), "yes": counts["yes"], "no": counts["no"], "unclear": unclear, **confusion.percent()}


def rows_by_type(predictions: Iterable[Row]) -> tuple[list[Row], dict[str, list[Row]]]:
    """(all rows, those of each type by its name, in order). Raises DataError without rows."""
    rows = list(predictions)
    if not rows:
        raise DataError("predictions is empty: nothing to score; check the question file and the run that wrote it")
    by_type: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_type[str(row["type"])].append(row)
    return rows, dict(sorted(by_type.items()))


def score_quickstart(predictions: Iterable[Row]) -> dict:
    """Rows with `question`, `answer`, `type`, `prediction` -> accuracy over all and per type, and existence scores.

    Everything is in percent: {"count", "accuracy", "standard_error", "types": {type: {"count", "accuracy", and "f1" for
    existence types}}, "existence": {"f1", "accuracy", "precision", "recall", "yes_ratio", ...}, None if none is asked}.
    Raises DataError without rows.
    """
    rows, by_type = rows_by_type(predictions)
    existence = [row for row in rows if is_existence(row["type"])]
    return {
        "count": len(rows),
        "accuracy": _percent(rows),
        "standard_error": standard_error(rows),
        "types": {name: _score_type(name, part) for name, part in by_type.items()},
        "existence": score_existence(existence) if existence else None,
    }


def _score_type(name: str, rows: Sequence[Row]) -> dict:
    score = {"count": len(rows), "accuracy": _percent(rows)}
    return score | {"f1": score_existence(rows)["f1"]} if is_existence(name) else score


def questions_of(conversations: Iterable[Mapping]) -> list[dict]:
    """LLaVA conversations with pictures -> rows for the baseline; `tag` holds the types of the turns, joined by "+"."""
    rows = []
    for sample in conversations:
        if not sample.get("image"):
            continue
        turns = [turn["value"].replace("<image>", "").strip() for turn in sample["conversations"]]
        kinds = sample.get("tag", "").split("+")
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        kinds += [""] * (len(pairs) - len(kinds))
        rows += [{"question": q, "answer": a, "type": kind} for (q, a), kind in zip(pairs, kinds, strict=False)]
    return rows


class QuestionOnlyBaseline:
    """The most frequent training answer to the same words: what a model reaches that never looks at the picture.

    A question never seen in training gets the most frequent answer of its type, then of the whole set. Ties go to the
    answer seen first. On easy-vqa's official split: 67.0 overall, 82.5 on yes/no, 23.3 on shape and colour.
    """

    def __init__(self, train_rows: Iterable[Row]) -> None:
        by_question: dict[str, Counter] = defaultdict(Counter)
        by_type: dict[str, Counter] = defaultdict(Counter)
        total: Counter = Counter()
        for row in train_rows:
            answer = normalise(row["answer"])
            for counter in (by_question[normalise(row["question"])], by_type[str(row["type"])], total):
                counter[answer] += 1
        if not total:
            raise DataError("train_rows is empty: the question-only baseline needs the training questions")
        self._answers = {question: _most_frequent(counter) for question, counter in by_question.items()}
        self._by_type = {name: _most_frequent(counter) for name, counter in by_type.items()}
        self._overall = _most_frequent(total)

    def __call__(self, row: Row) -> str:
        fallback = self._by_type.get(str(row["type"]), self._overall)
        return self._answers.get(normalise(row["question"]), fallback)

    def predict(self, rows: Iterable[Row]) -> list[dict]:
        """The same rows with the baseline's answer as `prediction`, ready for `score_quickstart`."""
        return [{**row, "prediction": self(row)} for row in rows]


def _most_frequent(counter: Counter) -> str:
    return counter.most_common(1)[0][0]


def compare_blanked(seen: Sequence[Row], blanked: Sequence[Row], baseline: Sequence[Row]) -> dict:
    """Does the model use the picture? The same questions answered with it, with blank pictures, and by the baseline.

    `falls_to_baseline` is true when the blanked accuracy is at most three standard errors above the baseline's: more
    than that would mean that the answers leak from somewhere else than the picture.
    Raises DataError when they are not the same rows.
    """
    if not len(seen) == len(blanked) == len(baseline):
        raise DataError(
            f"seen={len(seen)}, blanked={len(blanked)}, baseline={len(baseline)} rows: must be the same rows"
        )
    scores = {"seen": _percent(seen), "blanked": _percent(blanked), "baseline": _percent(baseline)}
    margin = 3.0 * standard_error(baseline)
    return {**scores, "margin": margin, "falls_to_baseline": scores["blanked"] <= scores["baseline"] + margin}
