"""What pages of measurements have in common that are made of results which lie in the repository as data."""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from megatron_moellava.experiments.results import with_kept, write_rows

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "measurements"
BINS = 30  # points of a curve


def page_options(description: str) -> argparse.Namespace:
    """`runs`: where finished runs are taken from, or None; `docs`: where data, page and picture are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="take finished runs from there (of `moellava ablate --runs`)")
    parser.add_argument("--docs", type=Path, default=DOCS, help="docs/measurements")
    return parser.parse_args()


def rows_of(options: argparse.Namespace, data: str, gather: Callable[[Path], list[dict]]) -> list[dict]:
    """The rows of a data file, into which what `gather` finds below `options.runs` has been taken."""
    file = options.docs / data
    rows = with_kept(gather(options.runs) if options.runs else [], file)
    if options.runs:
        write_rows(file, rows)
    return rows


def binned(values: list[float], count: int = BINS) -> list[float]:
    """Means of `count` equal stretches (fewer where there are fewer values)."""
    count = min(count, len(values))
    if not count:
        return []
    edges = [round(number * len(values) / count) for number in range(count + 1)]
    return [statistics.fmean(values[start:end]) for start, end in itertools.pairwise(edges)]


def signed(mean: float, deviation: float | None) -> str:
    """`-1.20 ± 0.10`"""
    return f"{mean:+.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def chance(p: float) -> str:
    """`= 0.0123`, `< 0.0001`"""
    return f"= {p:.4f}" if p >= 1e-4 else "< 0.0001"
