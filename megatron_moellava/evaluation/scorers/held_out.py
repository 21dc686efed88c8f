"""The quickstart's held-out questions: accuracy per type, existence, and the question-only baseline beside them."""

from megatron_moellava.evaluation.answered import Answered
from megatron_moellava.evaluation.metrics import Score, mean_percent, sum_by_unit
from megatron_moellava.evaluation.questions import read_json
from megatron_moellava.evaluation.quickstart.metrics import (
    QuestionOnlyBaseline,
    normalise,
    questions_of,
    score_quickstart,
)


def held_out(answered: Answered, train_file: str) -> Score:
    """Accuracy in percent; the bootstrap draws pictures."""
    rows = [dict(question.fields) | {"prediction": text} for question, text in answered]
    right = [float(normalise(row["prediction"]) == normalise(row["answer"])) for row in rows]
    details = {"trained": score_quickstart(rows)}
    train = answered.folder / train_file
    notes = []
    if train.exists():
        baseline = QuestionOnlyBaseline(questions_of(read_json(train)))
        details["question-only baseline"] = score_quickstart(baseline.predict(rows))
        notes.append(f"a model that never sees the picture: {details['question-only baseline']['accuracy']:.1f}")
    return Score(
        metric="accuracy (%)",
        sums_UK=sum_by_unit([row["image"] for row in rows], [(value, 1.0) for value in right]),
        headline=mean_percent,
        count=len(rows),
        details=details,
        notes=notes,
    )
