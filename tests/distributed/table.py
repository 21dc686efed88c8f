"""The table of docs/measurements/layouts.md from the results of a launch: table.py FOLDER... (the last folder wins).

`make test-layouts` leaves them below pytest's temporary folder, in `layouts`. Each row is a group of layouts and the
largest error that any of them has, relative to the largest entry of the tensor.
"""

import json
import sys
from pathlib import Path

from tests.distributed.layouts import LAYOUTS, SLOW_LAYOUTS, Layout

COLUMNS = ("loss", "gradients", "parameters")
# (title, words of a layout's name that put it here); the first that fits takes it
GROUPS = (
    ("bf16, any axis: loss", "bf16"),
    ("emulated FP8, any axis: loss", "fp8"),
    ("eight processes, mixed", "eight"),
    ("context parallel with others", "cp2-tp2 cp2-pp2 cp4 dp2-cp2 cp2-ep2"),
    ("context parallel", "cp2"),
    ("pipeline with others", "pp2-tp2 pp2-ep2 pp2-vpp2-tp2"),
    ("interleaved pipeline", "vpp2"),
    ("pipeline, uneven or by cost", "first1 first3 1-3 pp2-cost"),
    ("pipeline", "pp2"),
    ("tensor x expert x sequence", "tp2-ep2 dp2-ep2-tp2"),
    ("expert tensor parallel", "etp2"),
    ("tensor + sequence", "tp2 tp4"),
    ("expert", "ep2 ep4"),
    ("data, distributed optimizer", "dp2 dp4"),
    ("one process, other switches", "recompute sequential allgather"),
)


def group_of(layout: Layout) -> str:
    words = f"{layout.model} {layout.name}" + (" eight" if layout.world == 8 else "")
    return next(title for title, names in GROUPS if any(name in words for name in names.split()))


def rows(results: dict[str, dict]) -> list[str]:
    lines = ["| layouts | compared | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for title, _ in GROUPS:
        found = [
            results[layout.id]
            for layout in [*LAYOUTS, *SLOW_LAYOUTS]
            if group_of(layout) == title and layout.id in results
        ]
        if found:
            exact = COLUMNS if not title.endswith(": loss") else COLUMNS[:1]
            cells = [f"{max(r[name][0] for r in found):.1e}" if name in exact else "" for name in COLUMNS]
            lines.append(f"| {title} | {len(found)} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    results = {}
    for file in (file for folder in sys.argv[1:] for file in Path(folder).glob("*.json")):
        numbers = json.loads(file.read_text())
        if file.name != "jobs.json" and "gradients" in numbers and "parameters" in numbers:
            results[file.stem] = numbers
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
