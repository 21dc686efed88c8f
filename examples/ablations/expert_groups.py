"""The page "routing by modality" and its picture, from results that are in the repository as data.

  python examples/ablations/expert_groups.py --runs runs/ablations     take what is finished there into the data, then write
  python examples/ablations/expert_groups.py                           write page and picture from the data alone

The data: docs/measurements/data/modality_routing.jsonl, a row for each cell and seed of expert_groups.yaml: held-out loss, and
what the routes of its held-out questions send and wait for on 2, 4 and 8 expert-parallel ranks, beside what is predicted.
"""

import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pages import HERE, page_options, rows_of

from megatron_moellava.config import ExpertGroups, MoEConfig
from megatron_moellava.costs.expert_traffic import busiest_rank, copies_to_others, rows_to_others
from megatron_moellava.experiments.grid import Grid, load_grid
from megatron_moellava.experiments.results import collect, compare

DATA, PAGE, PICTURE = "data/modality_routing.jsonl", "modality_routing.md", "images/modality_routing.png"
RANKS, METRIC, QUESTIONS = (2, 4, 8), "held_out_loss", 60

EVEN = {  # experts of images, shared, of text
    "all for all": None,
    "image 4, text 4": (4, 0, 4),
    "image 3, shared 2, text 3": (3, 2, 3),
    "image 6, text 2": (6, 0, 2),
}
SHARE = 0.8  # of the tokens are of an image, in the table of even routers

HEAD = """# Routing by modality

Image tokens and text tokens with experts of their own (`moe.expert_groups`,
[how](../how-to/routing.md#experts-by-modality)): what it saves under expert parallelism, what it costs in level ranks, and what
in held-out loss. Made by `python examples/ablations/expert_groups.py`.

A token is sent to other ranks as one row for each choice by Megatron-Core's all-to-all, or as one copy for all experts of a
rank by DeepEP (`moe.moe_token_dispatcher_type=flex`, on GPUs). **Rows do not depend on who may choose whom: a token is as
likely to be on any rank, so under an all-to-all no grouping of experts saves a byte on the mean**; in a single step it
depends on where the visual tokens are ([bytes of a real one](performance.md#communication-per-step)). Copies do: neighbours
share one. Both are means for a token and a layer, with the tokens evenly over the ranks; a row is the hidden width x 2 bytes
in bf16, and travels there and back, in the forward and in the backward pass."""

RUNS = """## Trained

The quickstart's model, a million parameters on a CPU ([the grid](../../examples/ablations/expert_groups.yaml)); what it says
of the loss need not hold at the paper's size. Counted are the routes of held-out questions, asked of the trained models;
predicted are even routers at their share of image tokens. Means ± standard deviation over seeds; differences are of the
same seed, p of a paired t-test.

```bash
moellava ablate examples/ablations/expert_groups.yaml
python examples/ablations/expert_groups.py --runs runs/ablations
```"""


# What a test holds to the data (tests/unit/examples/test_expert_groups.py).
LESSONS = """## What it says

- **Experts of their own save copies, and cost hardly any loss.** Halves save more than a third of the copies on two ranks and a
  seventh on four, for 0.5 % of held-out loss, the same direction in every seed and not told from noise by three (p = 0.09).
- **In proportion to the tokens they save half as much on two ranks, more on four, and leave the ranks more level** on the mean
  than experts for all, whose learned routers are far from even; what that costs in loss, these seeds cannot tell from nothing.
- **Softly they save nothing here**: the routers pay the penalty, and fifty steps of a small model do not sort the tokens.
- **On as many ranks as experts nothing is saved**, whoever may choose whom: a copy and a row are the same there."""


def gather(runs: Path, grid: Grid) -> list[dict]:
    """What is finished below `runs`, with the traffic of its routes."""
    return [routed(grid, runs, row) for row in collect(grid, runs)]


def routed(grid: Grid, runs: Path, row: dict) -> dict:
    """A row of the data: the run's checkpoint asked once more, its routes kept."""
    from megatron_moellava import parallel
    from megatron_moellava.analysis.routing import collect_routes
    from megatron_moellava.analysis.traffic import traffic
    from megatron_moellava.checkpoint.folders import require_checkpoint
    from megatron_moellava.inference.load import load_model

    prepared = runs / next(node for node in grid.chain(row["cell"], row["seed"]) if node.step == "prepare").name
    model, prompter = load_model(require_checkpoint(runs / row["node"]), overrides=[], rows=True)
    data = [(str(prepared / "data/test.jsonl"), str(prepared / "data/images"))]
    routes = collect_routes(model, prompter, data, limit=QUESTIONS, pictures=0)
    image_share = float(routes.is_image_T.mean())
    counted = [asdict(traffic(routes.choices_TLK, routes.num_experts, ranks)) for ranks in RANKS]
    parallel.shutdown()
    own = {key: row[key] for key in ("grid", "cell", "seed", METRIC, "accuracy") if key in row}
    return own | {"image_share": round(image_share, 4), "counted": [rounded(item) for item in counted]}


def rounded(numbers: dict) -> dict:
    """To four digits behind the point."""
    return {name: round(value, 4) for name, value in numbers.items()}


def moe_of(grid: Grid, cell: str) -> MoEConfig:
    """The experts of a cell."""
    moe = next(node for node in grid.chain(cell, grid.seeds[0]) if node.step == "upcycle").settings["moe"]
    groups = moe.get("expert_groups")
    return MoEConfig(**moe | {"expert_groups": ExpertGroups(**groups) if groups else None})


def predicted(moe: MoEConfig, ranks: int, image_share: float) -> dict:
    """The same numbers of even routers."""
    return {
        "rows": rows_to_others(moe, ranks),
        "copies": copies_to_others(moe, ranks, image_share),
        "busiest": busiest_rank(moe, ranks, image_share),
    }


def table(grid: Grid, rows: list[dict]) -> str:
    """A line for each cell: its loss, and for each number of ranks the copies and the busiest rank, counted / predicted."""
    head = ["cell", "seeds", "held-out loss", "difference", "p"]
    head += [f"{what}, {ranks} ranks" for ranks in RANKS for what in ("copies", "busiest / mean")]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    baseline = losses(rows, grid.baseline)
    for cell in grid.cells:
        own, found = [row for row in rows if row["cell"] == cell], losses(rows, cell)
        if not own:
            continue
        against = compare(grid.baseline, found, baseline) if cell != grid.baseline else None
        told = against is not None and against.mean is not None and against.p is not None
        cells = [cell, str(len(own)), spread(list(found.values()))]
        cells += [f"{against.mean:+.4f} ± {against.deviation:.4f}", f"{against.p:.2f}"] if told else ["", ""]
        for number, ranks in enumerate(RANKS):
            even = predicted(moe_of(grid, cell), ranks, statistics.fmean(row["image_share"] for row in own))
            for what in ("copies", "busiest"):
                counted = statistics.fmean(row["counted"][number][what] for row in own)
                cells.append(f"{counted:.2f} / {even[what]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def losses(rows: list[dict], cell: str) -> dict[int, float]:
    """By seed."""
    return {row["seed"]: row[METRIC] for row in rows if row["cell"] == cell}


def spread(values: list[float]) -> str:
    """`0.1234 ± 0.0056`"""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{deviation}"


def saved(rows: list[dict], row: dict, number: int, baseline: str) -> float:
    """Share of the copies that a run saves against the baseline of its seed."""
    plain = next(other for other in rows if (other["cell"], other["seed"]) == (baseline, row["seed"]))
    return 1 - row["counted"][number]["copies"] / plain["counted"][number]["copies"]


def even_table() -> str:
    """What even routers send, and how level they leave the ranks."""
    head = ["eight experts", *(f"{what}, {ranks} ranks" for what in ("copies", "busiest / mean") for ranks in RANKS)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, counts in EVEN.items():
        image, shared, text = counts or (0, 8, 0)
        moe = MoEConfig(num_moe_experts=8, expert_groups=ExpertGroups(image=image, shared=shared, text=text))
        found = [predicted(moe, ranks, SHARE) for ranks in RANKS]
        cells = [f"{one[what]:.2f}" for what in ("copies", "busiest") for one in found]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def page(grid: Grid, rows: list[dict]) -> str:
    """The whole document; without runs what even routers would do."""
    sent = ", ".join(f"{rows_to_others(MoEConfig(num_moe_experts=8), ranks):.2f} on {ranks}" for ranks in RANKS)
    even = (
        f"Routers that spread each modality evenly over its experts, two choices for a token, {SHARE:.0%} of the tokens of "
        f"images (`costs/expert_traffic.py`). Rows under an all-to-all, whoever may choose whom: {sent} ranks."
    )
    parts = [HEAD, "## Even routers", even, even_table()]
    if rows:
        share = statistics.fmean(row["image_share"] for row in rows)
        note = f"{share:.0%} of the tokens are of an image. Pairs of numbers are counted / predicted."
        parts += [RUNS, note, table(grid, rows), f"![Copies saved against held-out loss]({PICTURE})", LESSONS]
    return "\n\n".join(parts) + "\n"


def draw(grid: Grid, rows: list[dict], path: Path) -> None:
    """Copies saved and level of the ranks against held-out loss, a panel for each number of ranks, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(RANKS), figsize=(13.5, 4.8), sharey=True, squeeze=False)
    baseline = losses(rows, grid.baseline)
    for number, (axis, ranks) in enumerate(zip(axes.flat, RANKS, strict=True)):
        for cell in grid.cells:
            own = [row for row in rows if row["cell"] == cell]
            if not own:
                continue
            at = [100 * saved(rows, row, number, grid.baseline) for row in own]
            level = statistics.fmean(row["counted"][number]["busiest"] for row in own)
            differences = [row[METRIC] - baseline[row["seed"]] for row in own]
            axis.plot(at, differences, "o", alpha=0.7, label=f"{cell}: busiest rank {level:.2f} x mean")
        axis.axhline(0, color="0.7", linewidth=0.8)
        axis.set(xlabel="copies to other ranks saved, %", title=f"{ranks} expert-parallel ranks")
        axis.margins(x=0.08)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=8)
    axes[0, 0].set_ylabel(f"held-out loss, nats - that of {grid.baseline}")
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    options = page_options(__doc__)
    grid = load_grid(HERE / "expert_groups.yaml")
    rows = rows_of(options, DATA, partial(gather, grid=grid))
    (options.docs / PAGE).write_text(page(grid, rows))
    if rows:
        draw(grid, rows, options.docs / PICTURE)
    print(f"{len(rows)} rows -> {options.docs / PAGE}")


if __name__ == "__main__":
    main()
