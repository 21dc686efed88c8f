"""Scores of the names benchmark: how much of what a thing is called does the model know?

A row has `answer` (the name), `type` ("name de"), `image`, `prediction`, and `loss`: minus the log of the probability of the
name, in nats, as `closed_questions.predict` gives it; `facts_of` takes apart a row that was asked for several names at once.
Exact match is what people ask for; bits per fact are finer, because they also count what is half known: the name of one of
1,024 equally likely things would cost 10 bits, a known one none. Names of one picture are right or wrong together, so that
standard errors are those of pictures.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_moellava.config import DataError
from megatron_moellava.evaluation.quickstart.metrics import Row, normalise, rows_by_type

SEPARATOR = "; "  # between the names of an answer that has several; a name may have a comma


def score_names(predictions: Iterable[Row]) -> dict:
    """{"count", "exact" and its "standard_error" in percent, "bits_per_fact" and its "bits_standard_error", "types": the same
    per type}; bits are None where rows have no `loss`, as those of the question-only baseline.

    Raises DataError without rows.
    """
    rows, by_type = rows_by_type(predictions)
    return _score(rows) | {"types": {name: _score(part) for name, part in by_type.items()}}


def _score(rows: Sequence[Row]) -> dict:
    right = [100.0 * (normalise(row["prediction"]) == normalise(row["answer"])) for row in rows]
    exact, error = _mean(right, rows)
    bits, bits_error = _mean(_bits(rows), rows) if all("loss" in row for row in rows) else (None, None)
    return {
        "count": len(rows),
        "exact": exact,
        "standard_error": error,
        "bits_per_fact": bits,
        "bits_standard_error": bits_error,
    }


def _bits(rows: Sequence[Row]) -> list[float]:
    return [float(str(row["loss"])) / math.log(2) for row in rows]


def _mean(values: Sequence[float], rows: Sequence[Row]) -> tuple[float, float]:
    """Mean and its standard error, where the values of one picture are no independent ones (0 where there is one picture)."""
    mean = sum(values) / len(values)
    apart: dict[str, float] = defaultdict(float)
    for value, row in zip(values, rows, strict=True):
        apart[str(row["image"])] += value - mean
    squares = sum(distance**2 for distance in apart.values()) * len(apart) / max(1, len(apart) - 1)
    return mean, math.sqrt(squares) / len(values)


def paired_bits(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, float]:
    """Mean of the bits per fact that `rows` save against `others`, and its standard error: the same questions, one by one.

    Raises DataError when they are not the same questions.
    """
    if [row["question_id"] for row in rows] != [row["question_id"] for row in others]:
        raise DataError("two sets of predictions answer different questions; ask both models the same file")
    saved = [theirs - ours for ours, theirs in zip(_bits(rows), _bits(others), strict=True)]
    return _mean(saved, rows)


def facts_of(answered: Iterable[Mapping[str, Any]], languages: Sequence[str]) -> list[dict]:
    """A row for each name that was asked for, of rows that were asked for their names in all `languages` at once.

    The rows have `answers` and `parts` (`closed_questions.predict`); those of the question-only baseline and of training have
    `answers` alone, and so have their facts.
    """
    facts = []
    for row in answered:
        parts = row.get("parts") or [{}] * len(languages)
        for language, name, part in zip(languages, row["answers"], parts, strict=True):
            asked = {"question_id": f"{row['question_id']} {language}", "question": f"{row['question']} ({language})"}
            facts.append(asked | {"image": row["image"], "answer": name, "type": f"name {language}"} | part)
    return facts
