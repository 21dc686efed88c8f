"""Results as Markdown and pictures. Nothing here is written by hand: a cell that has not been run is not mentioned."""

from collections.abc import Sequence
from pathlib import Path

from megatron_moellava.experiments.curves import read_lines
from megatron_moellava.experiments.grid import Grid
from megatron_moellava.experiments.results import LEVEL, Summary, judge, summarise

# Numbers beside the grid's own metrics, where a run has them: (key, head, format)
COLUMNS = (
    ("mflops_per_token", "MFLOPs/token", "{:.2f}"),
    ("activated_parameters", "M params activated", "{:.2f}"),
    ("parameters", "M params", "{:.2f}"),
    ("final_loss", "train loss", "{:.4f}"),
    ("max_load", "busiest / mean", "{:.2f}"),
    ("dead_experts", "dead experts", "{:.1f}"),
    ("dropped_share", "dropped", "{:.1%}"),
    ("loss_spikes", "loss spikes", "{:.1f}"),
    ("skipped_steps", "skipped steps", "{:.1f}"),
    ("diverged", "diverged", "{:.0%}"),
)
QUIET = ("dead_experts", "dropped_share", "loss_spikes", "skipped_steps", "diverged")  # shown when any is not 0


def table(grid: Grid, rows: Sequence[dict]) -> str:
    """Markdown: mean and standard deviation over seeds of every metric, and the paired difference of the first."""
    shown = cells_with_results(grid, rows)
    by_metric = {metric: {item.cell: item for item in summarise(grid, rows, metric)} for metric in grid.metrics}
    extra = [column for column in COLUMNS if column[0] not in grid.metrics and _is_telling(column[0], rows)]
    head = ["cell", "seeds", *grid.metrics, f"difference in {grid.metrics[0]}", "p", *(name for _, name, _ in extra)]
    lines = [_row(head), _row(["---"] * len(head))]
    for cell in shown:
        own = [row for row in rows if row["cell"] == cell]
        main = by_metric[grid.metrics[0]].get(cell)
        cells = [f"**{cell}**" if cell == grid.baseline else cell, str(len(own))]
        cells += [plus_minus(by_metric[metric].get(cell), metric) for metric in grid.metrics]
        cells += list(difference(main, grid.metrics[0]))
        cells += [_mean(own, key, text) for key, _, text in extra]
        lines.append(_row(cells))
    return "\n".join(lines)


def cells_with_results(grid: Grid, rows: Sequence[dict]) -> list[str]:
    """Names of the cells that have at least one row, in the grid's order."""
    return [cell for cell in grid.cells if any(row["cell"] == cell for row in rows)]


def _is_telling(key: str, rows: Sequence[dict]) -> bool:
    values = [row.get(key) for row in rows]
    return any(values) if key in QUIET else any(value is not None for value in values)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(rows: Sequence[dict], key: str, text: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return text.format(sum(values) / len(values)) if values else ""


def number(value: float, metric: str) -> str:
    """Losses with four digits after the point, percentages and the like with two."""
    return f"{value:.4f}" if "loss" in metric and "spikes" not in metric else f"{value:.2f}"


def plus_minus(summary: Summary | None, metric: str) -> str:
    """A metric as "mean ± deviation": the mean alone for one seed, an empty string without results."""
    if summary is None or summary.mean is None:
        return ""
    deviation = summary.deviation
    return number(summary.mean, metric) + ("" if deviation is None else f" ± {number(deviation, metric)}")


def difference(summary: Summary | None, metric: str) -> tuple[str, str]:
    """("+0.31 ± 0.12", "0.03"); empty for the baseline itself."""
    against = summary.against if summary else None
    if against is None or against.mean is None:
        return "", ""
    text = f"{'+' if against.mean >= 0 else ''}{number(against.mean, metric)}"
    text += f" ± {number(against.deviation, metric)}" if against.deviation is not None else ""
    return text, _p(against.p)


def findings(grid: Grid, rows: Sequence[dict]) -> list[str]:
    """What the paired tests say: a sentence per cell on the first metric, and on any other that differs beyond the noise."""
    sentences = []
    for metric in grid.metrics:
        for item in summarise(grid, rows, metric):
            p = item.against.p if item.against else None
            if metric == grid.metrics[0] or (p is not None and p < LEVEL):
                sentences += _finding(item, metric)
    return sentences


def _finding(item: Summary, metric: str) -> list[str]:
    """[one sentence] with the size of the effect beside the noise of seeds; [] without two seeds to compare."""
    against = item.against
    if against is None or against.mean is None or against.deviation is None:
        return []
    size = f"{'+' if against.mean >= 0 else ''}{number(against.mean, metric)} ({against.seeds} seeds, one run's spread "
    size += f"{number(item.deviation, metric)})" if item.deviation is not None else "unknown)"
    if against.p is None:
        words = "equal in every seed" if against.mean == 0 else "not tested"
    elif against.p < LEVEL:
        words = f"a difference beyond the noise, p = {against.p:.3f}"
    else:
        words = f"no difference that these seeds can tell from noise, p = {against.p:.2f}"
    return [f"`{item.cell}` against `{against.reference}`: {metric} {size}: {words}."]


def unknown_metrics(grid: Grid, rows: Sequence[dict]) -> str:
    """A sentence about metrics of the grid that no finished run has, most likely misspelt; empty when there is none."""
    lacking = [metric for metric in grid.metrics if not any(metric in row for row in rows)]
    if not lacking:
        return ""
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, int | float)} - {"seed"}
    return f"No finished run has {', '.join(lacking)}. `metrics` can be: {', '.join(sorted(numbers))}."


def claims_table(results: Sequence[tuple[Grid, Sequence[dict]]]) -> str:
    """Every claim of the paper that the grids test, how it fared, and how many held; empty when there is none."""
    found = judge(results)
    if not found:
        return ""
    words = [item.word for item in found]
    held, reverse = words.count("held"), words.count("the reverse")
    count = f"Of {len(words)} findings {held} held here, {reverse} came out the other way round, "
    count += f"{len(words) - held - reverse} could not be told from noise."
    head = ["the paper finds", "here", "metric", "better - worse", "noise of seeds", "p", "p, Holm"]
    lines = [count, "", _row(head), _row(["---"] * len(head))]
    for item in found:
        side = f" ({'same' if item.agrees else 'other'} direction)" if item.word == "not told from noise" else ""
        difference = item.comparison
        cells = [item.says, f"**{item.word}{side}**", item.metric, f"{difference.mean:+.4f}"]
        cells += [f"{difference.deviation:.4f}", *(_p(value) for value in (difference.p, item.p))]
        lines.append(_row(cells))
    return "\n".join(lines)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def paper_table(grid: Grid) -> str:
    """The paper's own numbers; empty when the grid has none."""
    if not grid.paper:
        return ""
    lines = [_row(["paper", *grid.paper["columns"]]), _row(["---"] * (len(grid.paper["columns"]) + 1))]
    lines += [
        _row([name, *("" if value is None else str(value) for value in values)])
        for name, values in grid.paper["rows"].items()
    ]
    note = grid.paper.get("note", "")
    return "\n".join(lines) + (f"\n\n{note}" if note else "")


def plot(grid: Grid, rows: Sequence[dict], path: Path) -> None:
    """Every run as a dot, the mean and the standard deviation of each cell, one panel per metric."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = cells_with_results(grid, rows)
    figure, panels = plt.subplots(
        1,
        len(grid.metrics),
        figsize=(1.6 + 4.2 * len(grid.metrics), 1.2 + 0.42 * len(shown)),
        squeeze=False,
        sharey=True,
    )
    for panel, metric in zip(panels[0], grid.metrics, strict=True):
        found = summarise(grid, rows, metric)
        for item in found:
            place = shown.index(item.cell)  # the same in every panel, also where a cell lacks a metric
            colour = "tab:orange" if item.cell == grid.baseline else "tab:blue"
            panel.errorbar(item.mean, place, xerr=item.deviation, color=colour, marker="D", capsize=4)
            values = list(item.values.values())
            panel.plot(values, [place + 0.18] * len(values), ".", color="k", alpha=0.5)
        panel.set_yticks(range(len(shown)), shown)
        panel.set_xlabel(metric)
        panel.grid(axis="x", alpha=0.3)
        base = [item.mean for item in found if item.cell == grid.baseline]
        if base:
            panel.axvline(base[0], color="tab:orange", linewidth=0.8, linestyle="--")
    panels[0][0].set_ylim(len(shown) - 0.5, -0.5)  # the first cell on top
    figure.suptitle(f"{grid.title} (dots: seeds; bars: standard deviation)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_curves(grid: Grid, rows: Sequence[dict], runs: Path, path: Path) -> None:
    """The loss of every step: a panel for each cell with a line for each seed, the baseline in grey behind it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[tuple[list, list]]] = {cell: [] for cell in grid.cells}
    for row in (row for row in rows if "node" in row):  # of results that were kept the runs may be gone
        steps = read_lines(runs / row["node"] / "steps.jsonl")
        curves[row["cell"]].append(([step["iteration"] for step in steps], [step["loss"] for step in steps]))
    shown = [cell for cell, own in curves.items() if own]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(4 * across, 2.4 * down), sharex=True, sharey=True, squeeze=False
    )
    for panel, cell in zip(panels.flat, shown, strict=False):
        for iterations, losses in curves[grid.baseline]:
            panel.plot(iterations, losses, color="0.75", linewidth=0.8)
        for iterations, losses in curves[cell]:
            panel.plot(iterations, losses, linewidth=0.8)
        panel.set_title(cell, fontsize=9)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(shown) :]:
        panel.set_visible(False)
    figure.supxlabel("step")
    figure.supylabel("loss")
    figure.suptitle(f"{grid.title} (lines: seeds; grey: {grid.baseline})", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(grid: Grid, rows: Sequence[dict], *pictures: str) -> str:
    """A section about one grid."""
    parts = [f"## {grid.title}", grid.question.strip(), table(grid, rows), unknown_metrics(grid, rows)]
    parts += [f"![{grid.title}]({picture})" for picture in pictures]
    found = findings(grid, rows)
    parts += ["\n".join(f"- {sentence}" for sentence in found)] if found else []
    parts += [paper_table(grid)]
    return "\n\n".join(part for part in parts if part) + "\n"
