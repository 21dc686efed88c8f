"""Short free text against reference answers: TextVQA's soft accuracy, GQA's exact match."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from megatron_moellava.config import DataError
from megatron_moellava.evaluation import normalise
from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.metrics import Score, mean_percent, sum_by_unit
from megatron_moellava.evaluation.questions import read_json

_TEXTVQA_ANNOTATORS = 10


def soft_accuracies(references: Sequence[str]) -> dict[str, float]:
    """Credit of each distinct reference: min(1, matches / 3) among the other nine, averaged over leaving each one out.

    An answer given by n of 10 people: each of its n givers sees n - 1 others, each of the rest sees n. So n = 3 gives
    (3 * 2/3 + 7 * 1) / 10 = 0.9, and n >= 4 gives 1.
    """
    total = len(references)
    return {
        answer: (n * min(1.0, (n - 1) / 3) + (total - n) * min(1.0, n / 3)) / total
        for answer, n in Counter(references).items()
    }


def textvqa(answered: Answered) -> Score:
    """TextVQA validation 0.5.1; rows are matched by picture (the question id) and lower-cased question.

    Raises DataError when the files are of different releases.
    """
    path = answered.folder / "TextVQA_0.5.1_val.json"
    annotations = {(row["image_id"], row["question"].lower()): row["answers"] for row in read_json(path)["data"]}
    credits: list[float] = []
    for question, text in answered:
        key = (question.id, normalise.textvqa_question(question.text))
        if key not in annotations:
            raise DataError(
                f"{path} has no question {key[1]!r} for image {key[0]}; the files are of different releases"
            )
        references = [normalise.evalai(answer) for answer in annotations[key]]
        if len(references) != _TEXTVQA_ANNOTATORS:
            raise DataError(f"{path}: image {key[0]} has {len(references)} answers: must be {_TEXTVQA_ANNOTATORS}")
        credits.append(soft_accuracies(references).get(normalise.evalai(text), 0.0))
    return Score(
        metric="soft accuracy (%)",
        sums_UK=sum_by_unit([question.id for question in answered.questions], [(value, 1.0) for value in credits]),
        headline=mean_percent,
        count=len(answered),
        notes=answered.note_subset(len(annotations)),
    )


def gqa(answered: Answered) -> Score:
    """GQA test-dev balanced: exact match, also for open ("query") and yes/no-like (binary) questions apart.

    Raises DataError when the files are of different releases.
    """
    path = answered.folder / "data/questions1.2/testdev_balanced_questions.json"
    annotations = read_json(path)
    right: list[float] = []
    kinds: dict[str, list[float]] = defaultdict(list)
    for question, text in answered:
        if str(question.id) not in annotations:
            raise DataError(f"{path} has no question {question.id}; the files are of different releases")
        truth = annotations[str(question.id)]
        right.append(float(normalise.gqa(text) == truth["answer"]))
        if structure := truth.get("types", {}).get("structural"):
            kinds["open" if structure == "query" else "binary"].append(right[-1])
    return Score(
        metric="accuracy (%)",
        sums_UK=sum_by_unit([question.fields["image"] for question in answered.questions], [(r, 1.0) for r in right]),
        headline=mean_percent,
        count=len(answered),
        details={f"{kind} accuracy": 100.0 * sum(part) / len(part) for kind, part in sorted(kinds.items())},
        notes=answered.note_subset(len(annotations)),
    )
