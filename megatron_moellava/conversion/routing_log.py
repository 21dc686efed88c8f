"""What a run has recorded of its routers (`routing.jsonl`), as conversions that go by it read it."""

import json
from pathlib import Path

ROUTING = "routing.jsonl"
PLACED_AT = "experts_placed_at"  # in a checkpoint's provenance: the step after which experts last changed their places


def steps_of(provenance: dict, iteration: int) -> range:
    """The steps whose records have the experts where they lie in the checkpoint of step `iteration`."""
    return range(provenance.get(PLACED_AT, -1) + 1, iteration + 1)


def records_of(file: Path, steps: range) -> list[dict]:
    """Records of `steps`, oldest first, each step once, as training keeps them; none where there is no file. A line that a
    kill cut off is passed over."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["iteration"] in steps:
            found.append(record)
    return found


def fits(record: dict, layers: tuple[int, ...], experts: int) -> bool:
    """Whether a record is of routers in these layers (from 0), with so many experts each."""
    rows = record["layers"]
    return {row["layer"] for row in rows} == set(layers) and all(len(row["choices"]) == experts for row in rows)


def asked_for(records: list[dict]) -> dict[int, list[int]]:
    """layer -> choices of each expert, those that were dropped for capacity included, summed over records."""
    sums: dict[int, list[int]] = {}
    for row in (row for record in records for row in record["layers"]):
        before = sums.get(row["layer"], [0] * len(row["choices"]))
        sums[row["layer"]] = [sum(counts) for counts in zip(before, row["choices"], row["dropped"], strict=True)]
    return sums
