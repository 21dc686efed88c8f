"""The picture of "where experts pay", drawn from the rows of its data (where_experts_pay.py)."""

import statistics
from collections.abc import Callable
from pathlib import Path

from megatron_moellava.experiments.grid import Grid
from megatron_moellava.experiments.results import summarise

METRIC = "bits_per_fact"

COLOURS = {
    "dense": "0.45",
    "top-1 of 8": "tab:orange",
    "top-2 of 16, half width": "tab:red",
    "top-2 of 4, as the paper": "tab:purple",
    "top-1 of 8, recipe's roles": "goldenrod",
    "top-1 of 8, half redrawn": "tab:brown",
    "top-1 of 8, a quarter redrawn": "tab:olive",
    "dense with 8 times the FFN": "tab:blue",
}
LABELS = {"dense": "dense, continued", "moe": "MoE, one of 8 experts"}


def draw(grids: dict[str, Grid], rows: list[dict], path: Path) -> None:
    """A panel for each of PANELS whose grid has something to compare, three to a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = {name: {row["cell"] for row in rows if row["grid"] == name} for name in grids}
    panels = [(name, put) for name, put in PANELS if len(cells[name]) > 1]
    down = -(-len(panels) // 3)
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure, axes = plt.subplots(down, 3, figsize=(13.5, 3.6 * down), squeeze=False)
        for axis, (name, put) in zip(axes.flat, panels, strict=False):
            put(axis, grids[name], [row for row in rows if row["grid"] == name])
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        figure.tight_layout(w_pad=2.5, h_pad=2.0)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def draw_arms(axis, grid: Grid, rows: list[dict]) -> None:
    """A bar for each arm, a dot for each seed."""
    found = summarise(grid, rows, METRIC)
    for place, item in enumerate(found):
        other = COLOURS["dense" if item.cell.startswith("dense") else "top-1 of 8"]
        axis.barh(place, item.mean, color=COLOURS.get(item.cell, other), height=0.45)
        axis.plot(list(item.values.values()), [place] * len(item.values), "o", color="k", markersize=3, alpha=0.6)
        cost = next(row["mflops_per_token"] for row in rows if row["cell"] == item.cell)
        text = f"{item.cell}: {item.mean:.1f} bits, {cost:.2f} MFLOPs"
        axis.annotate(text, (0, place - 0.28), xytext=(2, 1), textcoords="offset points", fontsize=8)
    axis.set_yticks([])
    axis.set_ylim(max(len(found), 4) - 0.6, -0.75)  # bars of one height
    axis.set(xlabel="held-out bits per fact (less is better)", title=grid.title)


def draw_curves(axis, grid: Grid, rows: list[dict]) -> None:
    """Training loss in the last stage, the mean over seeds; what is far above the baseline is cut off."""
    tops = [max(row["curve"]) for row in rows if row["cell"] == grid.baseline]
    for item in summarise(grid, rows, METRIC):
        own = [row for row in rows if row["cell"] == item.cell]
        means = [statistics.fmean(values) for values in zip(*(row["curve"] for row in own), strict=True)]
        at = [(number + 0.5) * own[0]["exposures"] / len(means) for number in range(len(means))]
        axis.plot(at, means, color=COLOURS[item.cell], label=item.cell, linewidth=1.8)
    axis.set_ylim(top=1.15 * max(tops))
    axis.set(
        xlabel="exposures of a fact in stage III",
        ylabel="nats per token, training",
        title="while stage III learns them",
    )


def draw_line(axis, grid: Grid, rows: list[dict]) -> None:
    """Bits per fact over the numbers in the cells' names ("dense-150", "8"); a line for each word before them."""
    lines: dict[str, list] = {}
    for item in summarise(grid, rows, METRIC):
        word, _, number = item.cell.rpartition("-")
        lines.setdefault(word or "moe", []).append((float(number), item))
    for word, points in lines.items():
        at, means = [number for number, _ in points], [item.mean for _, item in points]
        colour = COLOURS["dense" if word == "dense" else "top-1 of 8"]
        spread = [item.deviation or 0.0 for _, item in points]
        axis.errorbar(at, means, yerr=spread, color=colour, marker="o", capsize=3, linewidth=1.8, label=LABELS[word])
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [f"{number:g}" for number in at])
    axis.set(xlabel=grid.title[0].lower() + grid.title[1:], ylabel="held-out bits per fact", title=grid.title)
    if len(lines) > 1:
        axis.legend(frameon=False)


PANELS: tuple[tuple[str, Callable], ...] = (
    ("knowledge", draw_arms),
    ("knowledge", draw_curves),
    ("knowledge_length", draw_line),
    ("knowledge_few", draw_arms),
    ("knowledge_few", draw_curves),
    ("knowledge_experts", draw_line),
    ("knowledge_strategy", draw_arms),
    ("knowledge_topk", draw_arms),
    ("knowledge_capacity", draw_arms),
    ("knowledge_placement", draw_arms),
    ("knowledge_size", draw_arms),
    ("knowledge_longer", draw_arms),
    ("knowledge_pictures", draw_arms),
    ("knowledge_vendors", draw_arms),
)
