"""The table of adapters beside the whole experts is what its results in the repository give."""

import json

from megatron_moellava.experiments.grid import load_grid
from megatron_moellava.experiments.tables import table
from tests.helpers.paths import REPO

DATA, PAGE = REPO / "docs/measurements/data/lora.jsonl", REPO / "docs/tutorials/lora.md"


def test_the_tutorials_table_is_made_of_the_data():
    grid = load_grid(REPO / "examples/ablations/lora.yaml")
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]
    assert {row["cell"] for row in rows} == set(grid.cells) and {row["seed"] for row in rows} == {1, 2, 3}
    assert table(grid, rows) in PAGE.read_text()
