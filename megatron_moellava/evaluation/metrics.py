"""Numbers that several benchmarks share: a confusion table, and scores that know their own standard error.

Every benchmark's headline is a function of sums over independent units (a picture with all its questions, mostly: the
questions of one picture are right or wrong together, and treating them as independent understates the error). A scorer
therefore returns one row of sums per unit, legend: U units, K sums. The bootstrap then needs no second pass over texts:
it draws units with replacement and applies the same headline to the new sums.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BOOTSTRAP_SAMPLES = 1000
_SAMPLES_PER_BLOCK = 50  # bounds the memory of the drawn counts: 50 x units


def answers_yes(text: str) -> bool:
    """POPE's reading of an answer: the first sentence, without commas, is a no if it holds No, no or not, else a yes.

    An answer in neither word is therefore a yes, and so is "NO" in capitals; so the original counts.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


@dataclass(slots=True)
class Confusion:
    """Weighted counts of a yes/no question; yes is the positive class."""

    true_positive: float = 0.0
    false_positive: float = 0.0
    true_negative: float = 0.0
    false_negative: float = 0.0

    def add(self, *, predicted: bool, truth: bool, weight: float = 1.0) -> None:
        """Count one answered question."""
        name = f"{'true' if predicted == truth else 'false'}_{'positive' if predicted else 'negative'}"
        setattr(self, name, getattr(self, name) + weight)

    def percent(self) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and share of yes, in percent; 0 where the original would divide by zero."""
        hits, alarms = self.true_positive, self.false_positive
        misses, total = self.false_negative, self.true_positive + alarms + self.true_negative + self.false_negative
        return {
            "accuracy": 100.0 * _ratio(hits + self.true_negative, total),
            "precision": 100.0 * _ratio(hits, hits + alarms),
            "recall": 100.0 * _ratio(hits, hits + misses),
            "f1": 100.0 * _ratio(2.0 * hits, 2.0 * hits + alarms + misses),
            "yes_ratio": 100.0 * _ratio(hits + alarms, total),
        }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One benchmark's result: `sums_UK` and `headline` are for the bootstrap, the rest is for the reader."""

    metric: str  # what the value is, e.g. "accuracy (%)"
    sums_UK: np.ndarray
    headline: Callable[[np.ndarray], float]  # sums over the units, [K] -> the value
    count: int  # questions scored
    unit: str = "image"  # what the bootstrap draws
    details: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what a reader must know before comparing: the judge, a subset, a local stand-in

    @property
    def value(self) -> float:
        """The headline over all units, in the unit that `metric` names."""
        return self.headline(self.sums_UK.sum(axis=0))

    def standard_error(self, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> float:
        """Bootstrap standard error of the headline over units; 0 when there is a single unit."""
        generator = np.random.default_rng(seed)
        units = len(self.sums_UK)
        values: list[float] = []
        for start in range(0, samples, _SAMPLES_PER_BLOCK):
            block = min(_SAMPLES_PER_BLOCK, samples - start)
            counts_BU = generator.multinomial(units, np.full(units, 1.0 / units), size=block)
            values.extend(self.headline(sums_K) for sums_K in counts_BU @ self.sums_UK)
        return float(np.std(values, ddof=1)) if samples > 1 else 0.0


def sum_by_unit(units: Sequence[object], sums_QK: Sequence[Sequence[float]]) -> np.ndarray:
    """Adds up the sums of the questions of each unit: Q questions -> U units, in order of first appearance."""
    numbers: dict[object, int] = {}
    index_Q = [numbers.setdefault(unit, len(numbers)) for unit in units]
    rows_QK = np.asarray(sums_QK, dtype=np.float64)
    sums_UK = np.zeros((len(numbers), rows_QK.shape[1]))
    np.add.at(sums_UK, index_Q, rows_QK)
    return sums_UK


def mean_percent(sums_K: np.ndarray) -> float:
    """Headline of the simple benchmarks: column 0 is the credit, column 1 the number of questions."""
    return 100.0 * _ratio(sums_K[0], sums_K[1])
