"""A small grid of runs, and results as its runs would have left them."""

from pathlib import Path

from megatron_moellava.experiments.grid import load_grid

BASE = """
seeds: [1, 2, 3]
steps:
  prepare: {kind: command, command: ["{python}", -c, "open('{folder}/data.json', 'w').write('{colour} {seed}')"], colour: red}
  stage2: {kind: train, from: prepare/start, stage: 2, steps: 100, data: prepare/data.json}
  upcycle: {kind: upcycle, from: stage2, moe: {num_moe_experts: 4}}
  stage3: {kind: train, from: upcycle, stage: 3, steps: 10, data: prepare/data.json, set: {optimizer: {lr: 0.1}}}
"""


GRID = """
extends: base.yaml
baseline: four
cells:
  four: {}
  two: {upcycle.moe.num_moe_experts: 2}
  slow: {stage3.set.optimizer.lr: 0.01}
  dense: {stage3.from: stage2, stage3.stage: 2}
  early: {end: stage2}
claims: [{says: four rather than two, better: four, worse: two}]
paper: {columns: [GQA], rows: {four: [61.5], two: [null]}}
"""


def made(folder: Path, text: str = GRID, base: str = BASE, **options):
    """The grid of these two files, written to `folder`."""
    (folder / "base.yaml").write_text(base)
    (folder / "grid.yaml").write_text(text)
    return load_grid(folder / "grid.yaml", **options)


def rows_of(grid, values: dict[str, list[float]]) -> list[dict]:
    """Result rows of cells: {cell: accuracy of seed 1, 2, ...}."""
    return [
        {"grid": "grid", "cell": cell, "seed": seed, "accuracy": value, "final_loss": 0.5}
        for cell, own in values.items()
        for seed, value in enumerate(own, start=1)
    ]
