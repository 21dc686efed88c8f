"""What a run has recorded of its routers (`routing.jsonl`), as conversions that go by it read it."""

import json
from pathlib import Path

ROUTING = "routing.jsonl"


def records_until(file: Path, iteration: int) -> list[dict]:
    """Records of steps up to `iteration`, oldest first, each step once, as training keeps them; none where there is no file. A
    line that a kill cut off is passed over."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["iteration"] <= iteration:
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
