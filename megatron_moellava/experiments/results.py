"""What a grid has found: one row per cell and seed, their mean and spread, and a paired test against the baseline.

Seeds are paired: the same seed gives every cell the same start, the same stages 1 and 2 and the same order of the data,
so that differences within a seed say more than those between means.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moellava.config import ConfigError
from megatron_moellava.experiments.grid import Grid
from megatron_moellava.experiments.nodes import finished

RESULTS = "results.jsonl"
LEVEL = 0.05  # of the paired test
LOWER_IS_BETTER = {
    "held_out_loss",
    "bits_per_fact",
    "final_loss",
    "peak_loss",
    "loss_spikes",
    "max_load",
    "dead_experts",
    "dropped_share",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Differences of a metric to the reference, over the seeds that both have. None where two seeds are lacking."""

    reference: str
    seeds: int
    mean: float | None
    deviation: float | None
    p: float | None  # two-sided paired t-test


@dataclass(frozen=True, slots=True)
class Summary:
    """One metric of one cell: its value per seed, their mean and deviation, and the comparison with the baseline."""

    cell: str
    values: dict[int, float]  # by seed
    mean: float | None
    deviation: float | None  # of one run, between seeds
    against: Comparison | None


def collect(grid: Grid, runs: Path) -> list[dict]:
    """{"grid", "cell", "seed", "node", numbers} of every finished cell and seed."""
    rows = []
    for cell, seed in grid.runs():
        node = grid.chain(cell, seed)[-1]
        done = finished(runs, node)
        if done is not None:
            rows.append({"grid": grid.name, "cell": cell, "seed": seed, "node": node.name, **done.get("numbers", {})})
    return rows


def with_kept(rows: Sequence[dict], file: Path) -> list[dict]:
    """`rows` and those of a file of results (JSON lines) that they do not replace, by grid, cell and seed; sorted so.

    Raises ConfigError where the file has anything else.
    """
    try:
        kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        found = {(row["grid"], row["cell"], row["seed"]): row for row in [*kept, *rows]}
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{file} should have one result a line, as JSON with grid, cell and seed: {problem}"
        ) from None
    return [found[key] for key in sorted(found)]


def write_rows(file: Path, rows: Sequence[dict]) -> None:
    """As JSON lines, complete or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.rename(file)


def write_results(folder: Path, rows: Sequence[dict]) -> None:
    """Write `rows` as results.jsonl, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / RESULTS, rows)


def summarise(grid: Grid, rows: Sequence[dict], metric: str) -> list[Summary]:
    """One summary per cell that has a result, in the grid's order."""
    values = {cell: _values(rows, cell, metric) for cell in grid.cells}
    summaries = []
    for cell, own in values.items():
        if not own:
            continue
        other = grid.reference(cell)
        comparison = compare(other, own, values[other]) if other else None
        mean, deviation = spread(list(own.values()))
        summaries.append(Summary(cell, own, mean, deviation, comparison))
    return summaries


@dataclass(frozen=True, slots=True)
class Judged:
    """How a claim of the paper fares on its grid's first metric."""

    says: str
    metric: str
    comparison: Comparison  # better - worse
    p: float | None  # corrected for all claims that were judged together; None where every seed is equal

    @property
    def word(self) -> str:
        """`held`, `the reverse`, `equal in every seed` or `not told from noise`."""
        if self.p is None:
            return "equal in every seed"
        if self.p >= LEVEL:
            return "not told from noise"
        return "held" if self.agrees else "the reverse"

    @property
    def agrees(self) -> bool:
        """Whether the mean lies on the side that the claim says."""
        assert self.comparison.mean is not None
        return self.comparison.mean < 0 if self.metric in LOWER_IS_BETTER else self.comparison.mean > 0


def judge(results: Sequence[tuple[Grid, Sequence[dict]]]) -> list[Judged]:
    """Every claim of the grids that has two seeds of both its cells, in their order; p corrected by Holm for all together."""
    found = []
    for grid, rows in results:
        for claim in grid.claims:
            better, worse = (_values(rows, claim[side], grid.metrics[0]) for side in ("better", "worse"))
            compared = compare(claim["worse"], better, worse)
            is_equal = compared.mean == 0 and compared.seeds > 1
            if compared.p is not None or is_equal:
                found.append((claim["says"], grid.metrics[0], compared))
    tested = {number: compared.p for number, (_, _, compared) in enumerate(found) if compared.p is not None}
    corrected = dict(zip(tested, holm([*tested.values()]), strict=True))
    return [Judged(*parts, corrected.get(number)) for number, parts in enumerate(found)]


def _values(rows: Sequence[dict], cell: str, metric: str) -> dict[int, float]:
    found = {row["seed"]: row.get(metric) for row in rows if row["cell"] == cell}
    return {seed: value for seed, value in found.items() if value is not None}


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def compare(name: str, own: dict[int, float], other: dict[int, float]) -> Comparison:
    """Paired differences own - other."""
    differences = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    mean, deviation = spread(differences)
    return Comparison(name, len(differences), mean, deviation, paired_p(differences))


def paired_p(differences: Sequence[float]) -> float | None:
    """p of a two-sided t-test that the mean difference is zero; None when it is not defined."""
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or not any(differences):
        return None
    if len(set(differences)) == 1:
        return 0.0
    p = float(ttest_1samp(differences, 0.0).pvalue)
    return p if math.isfinite(p) else None


def holm(values: Sequence[float]) -> list[float]:
    """p values of several tests -> the same, corrected by Holm's step-down: the chance of any false find stays at the level.

    >>> [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, values[index] * (len(values) - rank)))
        corrected[index] = largest
    return corrected
