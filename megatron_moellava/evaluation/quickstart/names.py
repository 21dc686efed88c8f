"""Scores of the names benchmark: how much of what a thing is called does the model know?

A row has `answer` (the name), `type` ("name de"), `prediction`, and `loss`: minus the log of the probability of the name, in
nats, as `closed_questions.predict` gives it. Exact match is what people ask for; bits per fact are finer, because they
also count what is half known: the name of one of 1,024 equally likely things would cost 10 bits, a known one none.
"""

import math
from collections.abc import Iterable, Sequence

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.quickstart.metrics import Row, normalise, rows_by_type, standard_error


def score_names(predictions: Iterable[Row]) -> dict:
    """{"count", "exact" and its "standard_error" in percent, "bits_per_fact" and its "bits_standard_error", "types": the same
    per type}; bits are None where rows have no `loss`, as those of the question-only baseline.

    Raises DataError without rows.
    """
    rows, by_type = rows_by_type(predictions)
    return _score(rows) | {"types": {name: _score(part) for name, part in by_type.items()}}


def _score(rows: Sequence[Row]) -> dict:
    bits, bits_error = _bits(rows)
    right = sum(normalise(row["prediction"]) == normalise(row["answer"]) for row in rows)
    return {
        "count": len(rows),
        "exact": 100.0 * right / len(rows),
        "standard_error": standard_error(rows),
        "bits_per_fact": bits,
        "bits_standard_error": bits_error,
    }


def _bits(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """Mean of the bits that a name costs, and the standard error of the mean."""
    if any("loss" not in row for row in rows):
        return None, None
    bits = [float(str(row["loss"])) / math.log(2) for row in rows]
    mean = sum(bits) / len(bits)
    variance = sum((value - mean) ** 2 for value in bits) / max(1, len(bits) - 1)
    return mean, math.sqrt(variance / len(bits))


def paired_bits(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, float]:
    """Mean of the bits per fact that `rows` save against `others`, and its standard error: the same questions, one by one.

    Raises DataError when they are not the same questions.
    """
    if [row["question_id"] for row in rows] != [row["question_id"] for row in others]:
        raise DataError("two sets of predictions answer different questions; ask both models the same file")
    saved = [{"loss": float(str(b["loss"])) - float(str(a["loss"]))} for a, b in zip(rows, others, strict=True)]
    mean, error = _bits(saved)
    assert mean is not None and error is not None, "every row has a loss"
    return mean, error
