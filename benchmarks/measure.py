"""What the benchmarks share: ways that take turns, medians, and how results leave the process.

A figure is a ratio of two ways measured in the same run, turn by turn, so that whatever else the machine does meets both.
Every benchmark prints what it sees on stderr and one JSON object on stdout; run.py collects those.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable


def keep_kernels() -> None:
    """For ways that have more shapes of products together than oneDNN keeps kernels, 1,024: each would drive out the others',
    which no training of one of them meets. To be called before anything is multiplied."""
    os.environ.update(ONEDNN_PRIMITIVE_CACHE_CAPACITY="20000", LRU_CACHE_CAPACITY="20000")


def take_turns(ways: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every way in each round. Each round another one begins: what a way leaves in memory meets the next."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways.items())
    for number in range(-warm_up, rounds):
        order = order[1:] + order[:1]
        for name, way in order:
            started = time.perf_counter()
            way()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median over the rounds of slower / faster within a round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def rounded(value, digits: int = 4):
    """Nested plain data with floats of `digits` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def finish(results: dict) -> None:
    print(json.dumps(rounded(results)), flush=True)
