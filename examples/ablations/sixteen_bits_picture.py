"""The picture of "where 16 bits break", drawn from the rows of its data (sixteen_bits_page.py)."""

import math
from pathlib import Path

from megatron_moellava.experiments.grid import Grid

LARGEST_FP16 = 65504.0
TELLING = ("bf16", "fp16", "bf16-wild", "fp16-wild", "gentle-bf16-params", "gentle-bf16-params-stochastic")
COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:purple")  # of the layers
ACTIVATIONS = {"attention": ":", "mlp": "--", "hidden": "-", "router_logits": "-."}
GRADIENTS = {"attention_gradient": ":", "mlp_gradient": "--", "hidden_gradient": "-"}
LABELS = ("largest activation", "largest gradient", "training loss, nats per token")


def draw(grid: Grid, rows: list[dict], path: Path) -> None:
    """A column for each telling arm: activations, gradients, and its loss before that of the arm it is compared with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [cell for cell in TELLING if any(row["cell"] == cell for row in rows)]
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        size = (2.8 * len(shown), 7.6)
        figure, axes = plt.subplots(3, len(shown), figsize=size, sharex="col", sharey="row", squeeze=False)
        for column, cell in zip(axes.T, shown, strict=True):
            own = [row for row in rows if row["cell"] == cell]
            draw_largest(column[0], own, ACTIVATIONS)
            column[0].axhline(LARGEST_FP16, color="tab:red", linewidth=1.0)
            draw_largest(column[1], own, GRADIENTS)
            draw_end_of_gradients(column[1], own)
            draw_losses(
                column[2], [row for row in rows if row["cell"] == grid.reference(cell)], "0.75", "compared with"
            )
            draw_losses(column[2], own, "k", "this arm")
            column[0].set_title(cell)
            column[0].set_xlim(0, 1.02 * max(row["steps"] for row in own))  # one that diverged is short
            column[2].set_xlabel("step")
        for axis, label in zip(axes[:, 0], LABELS, strict=True):
            axis.set_ylabel(label)
        axes[0, 0].annotate(
            "fp16 ends", (0, LARGEST_FP16), (0, 3), textcoords="offset points", color="tab:red", fontsize=7
        )
        for axis in (axes[0, -1], axes[2, -1]):
            axis.legend(frameon=False, fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def draw_largest(axis, rows: list[dict], styles: dict[str, str]) -> None:
    """The largest of all seeds, for every point and layer."""
    axis.set_yscale("log")
    for point, style in styles.items():
        for layer, colour in zip(range(len(rows[0]["largest"][point])), COLOURS, strict=False):
            label = f"{point.replace('_', ' ')}, layer {layer + 1}"
            axis.plot(*over_steps(rows, point, layer), style, color=colour, linewidth=1.3, label=label)


def draw_end_of_gradients(axis, rows: list[dict]) -> None:
    """Where a gradient times the loss scale is fp16's largest, in the longest run in fp16."""
    runs = [row for row in rows if "loss_scales" in row]
    if runs:
        run = max(runs, key=lambda row: len(row["iterations"]))
        ends = [LARGEST_FP16 / scale for scale in run["loss_scales"]]
        axis.plot(run["iterations"], ends, color="tab:red", linewidth=1.0)


def over_steps(rows: list[dict], point: str, layer: int) -> tuple[list[int], list[float]]:
    """Recorded steps, and the largest value of any run at each; what is not finite is infinity."""
    found: dict[int, float] = {}
    for row in rows:
        for step, value in zip(row["iterations"], row["largest"][point][layer], strict=True):
            found[step] = max(found.get(step, 0.0), math.inf if value is None else value)
    return sorted(found), [found[step] for step in sorted(found)]


def draw_losses(axis, rows: list[dict], colour: str, label: str) -> None:
    """A line for each seed."""
    for number, row in enumerate(rows):
        losses = [math.nan if loss is None else loss for loss in row["curve"]]
        at = [(stretch + 0.5) * row["steps"] / len(losses) for stretch in range(len(losses))]
        axis.plot(at, losses, color=colour, linewidth=1.0, label=None if number else label)
