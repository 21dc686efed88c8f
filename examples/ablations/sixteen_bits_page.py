"""The page "sixteen bits" and its picture, from results that are in the repository as data.

  python examples/ablations/sixteen_bits_page.py --runs runs/ablations     take what is finished there into the data, then write
  python examples/ablations/sixteen_bits_page.py                           write page and picture from the data alone

The data: docs/measurements/data/sixteen_bits.jsonl, a row for each cell and seed of sixteen_bits.yaml, with its loss and with
the largest activations and gradients of each layer.
"""

import math
from functools import partial
from pathlib import Path

from experts_picture import METRIC
from pages import HERE, binned, chance, page_options, rows_of, signed
from sixteen_bits_picture import LARGEST_FP16, draw

from megatron_moellava.experiments.curves import read_lines
from megatron_moellava.experiments.grid import Grid, load_grid
from megatron_moellava.experiments.nodes import finished
from megatron_moellava.experiments.results import Comparison, collect, compare, holm, summarise
from megatron_moellava.experiments.tables import cells_with_results, plus_minus

DATA, PAGE, PICTURE = "data/sixteen_bits.jsonl", "sixteen_bits.md", "images/sixteen_bits.png"
LOSSES = ("final_loss", "peak_loss")
COUNTS = ("loss_spikes", "skipped_steps", "diverged")
ACTIVATIONS = ("attention", "mlp", "hidden")
GRADIENTS = tuple(f"{point}_gradient" for point in ACTIVATIONS)
LOGITS = ("router_logits",)

HEAD = """# Where 16 bits break

Made from `data/sixteen_bits.jsonl`, which holds the result of every run:

```bash
moellava ablate examples/ablations/sixteen_bits.yaml --jobs 2                    # run or continue
python examples/ablations/sixteen_bits_page.py --runs runs/ablations             # this page
```

Task and model are those of [where experts pay](where_experts_pay.md): names to be known by heart, a Llama of 2 layers of 64.
Stage III trains what the recipe's does: experts, routers, projector. Bits per fact are asked in the format of the run; fewer
are better. Means ± standard deviation over seeds; differences are of the same seed, which shares data, weights, stage II and
the order of the data; p is of a two-sided paired t-test, and "p, Holm" corrects it for all comparisons of this page
together."""

ROOM = """The picture and the table below show the largest value over all tokens of a step and over seeds, the picture each
layer apart; recorded were every 50th step, in wild arms every 10th or every second. "hidden" is the residual stream behind a
layer, "attention" and "mlp" (the experts) what they add to it. Gradients are those of the loss itself; fp16 holds them
times the loss scale, and the red line is where that ends. The table counts the records until the first value that was not
finite."""

# What a test holds to the data (tests/unit/examples/test_sixteen_bits_page.py).
LESSONS = """## What it says

- **What ends in fp16 is the residual stream, on the way forward.** At the wild rate what the experts add to it passes
  65,504 within twenty steps, in every seed. From then on the loss is not finite, the loss scale falls to 1 in vain, and
  the run stops. It is not the routers: their logits stay below a hundred until then. Nor is it the backward pass of the
  stream, which reports from elsewhere name: behind the experts its gradients shrink as the stream grows, because the norms
  divide by its size. Before the first experts they are largest, and come within a factor of two of the end, which a smaller
  loss scale moves.
- **bf16 mends it; clipping does not.** With fp32's range the same run goes to its end with a stream of more than ten
  times what fp16 holds. It learns little at that rate: it ends knowing less than after stage II. A lower rate mends it as
  well. Clipped gradients do not, since Adam divides by their size anyway.
- **At twenty times the usual rate fp16 still holds,** with a stream at about a seventh of its end, a loss scale that was
  halved at most once, and hardly a step skipped. What it learns cannot be told from what bf16 learns, there or at the gentle
  rate, where the two agree to a few hundredths of a bit in every seed.
- **Under that stress little else can be told apart.** A warm-up and rounding by chance point to the better, by less than
  three seeds can tell after correction. A z-loss of 0.001 keeps the routers' logits smaller and costs about seven bits a fact
  in every seed: more than all that stage III learns.
- **Where updates are small, it is the weights that break.** At the gentle rate bf16 weights without an fp32 copy lose
  more than half of what stage III learns, and no activation or gradient shows it. Rounded by chance instead of to the
  nearest they learn what weights with a copy do, to a tenth of a bit."""


HISTORY = """## How it came about

The rates were found on seed 1. The first stress, sixty thousandths (twenty times the usual rate), did not break fp16; so the
wild rate, four times that, was added to see where it does. The gentle rate was chosen after trials of 150 steps, as one at
which what stage III learns comes of small updates. The other arms of the grid were settled before their runs."""


# --- the data -------------------------------------------------------------------------------------------------------------


def gather(runs: Path, grid: Grid) -> list[dict]:
    """What is finished below `runs`, with its loss in thirty stretches and the records of its largest activations.

    `before`: bits per fact after stage II.
    """
    rows = []
    for row in collect(grid, runs):
        own = {key: row[key] for key in ("grid", "cell", "seed", METRIC, *LOSSES, *COUNTS, "steps") if key in row}
        stage2 = next(node for node in grid.chain(row["cell"], row["seed"]) if node.step == "stage2")
        own["before"] = ((finished(runs, stage2) or {}).get("numbers") or {}).get(METRIC)
        folder = runs / row["node"]
        losses = [step["loss"] for step in read_lines(folder / "steps.jsonl")]
        own["curve"] = [four_digits(loss) for loss in binned(losses)]
        rows.append(own | traces(read_lines(folder / "activations.jsonl")))
    return rows


def traces(records: list[dict]) -> dict:
    """{"iterations", "loss_scales" (of fp16), "largest": {point: for each layer the values of the records}}."""
    found: dict = {"iterations": [record["iteration"] for record in records]}
    if any("loss_scale" in record for record in records):
        found["loss_scales"] = [record["loss_scale"] for record in records]
    layers = range(len(records[0]["layers"])) if records else ()
    largest = {
        point: [[four_digits(record["layers"][layer][point]) for record in records] for layer in layers]
        for point in (*ACTIVATIONS, *GRADIENTS, *LOGITS)
    }
    return found | {"largest": largest}


def four_digits(value: float) -> float | None:
    """None for what is not finite, which JSON does not know."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def first_break(row: dict) -> tuple[int, str]:
    """(number of the record, `step 14: mlp of layer 1`) of a run's first value that is not finite, in the order of a pass.

    (number of records, "") where all are finite.
    """
    for record, step in enumerate(row["iterations"]):
        for points in ((*ACTIVATIONS, *LOGITS), GRADIENTS):
            for layer in range(len(row["largest"]["hidden"])):
                for point in points:
                    if row["largest"][point][layer][record] is None:
                        return record, f"step {step}: {point} of layer {layer + 1}"
    return len(row["iterations"]), ""


def top(row: dict, points: tuple[str, ...], *, scaled: bool = False) -> float:
    """The largest of these points in a run, over layers and the records until a value was not finite.

    `scaled`: as fp16 holds it, times the loss scale.
    """
    count = first_break(row)[0]
    scales = row["loss_scales"] if scaled else [1.0] * count
    values = [
        value * scale
        for point in points
        for layer in row["largest"][point]
        for value, scale in zip(layer[:count], scales[:count], strict=True)
    ]
    return max(values, default=math.nan)


# --- the page -------------------------------------------------------------------------------------------------------------


def comparisons(grid: Grid, rows: list[dict]) -> dict[tuple[str, str], tuple[Comparison, float | None]]:
    """(cell, what it is compared with) -> paired difference in bits per fact, and p corrected for all of these (Holm)."""
    values = {item.cell: item.values for item in summarise(grid, rows, METRIC)}
    pairs = [(cell, other) for cell in values if (other := grid.reference(cell)) in values]
    pairs += [
        (claim["better"], claim["worse"]) for claim in grid.claims if {claim["better"], claim["worse"]} <= values.keys()
    ]
    found = {(cell, other): compare(other, values[cell], values[other]) for cell, other in pairs}
    tested = [pair for pair, item in found.items() if item.p is not None]
    corrected = dict(zip(tested, holm([found[pair].p for pair in tested]), strict=True))
    return {pair: (item, corrected.get(pair)) for pair, item in found.items()}


def arms_table(grid: Grid, rows: list[dict]) -> str:
    """A line for each arm: bits per fact, its difference from what it is compared with, and how calm the run was."""
    found = comparisons(grid, rows)
    by_metric = {
        metric: {item.cell: item for item in summarise(grid, rows, metric)} for metric in ("before", METRIC, *LOSSES)
    }
    heads = [
        "arm",
        "seeds",
        "after stage II",
        "bits per fact",
        "against",
        "difference",
        "p",
        "p, Holm",
        "final loss",
        "highest loss",
    ]
    lines = [[*heads, "loss spikes, a run", "skipped steps, a run", "diverged"]]
    lines.append(["---"] * len(lines[0]))
    for cell in cells_with_results(grid, rows):
        own = [row for row in rows if row["cell"] == cell]
        other = grid.reference(cell) or ""
        line = [cell if other else f"**{cell}**", str(len(own))]
        line += [*(plus_minus(by_metric[metric].get(cell), METRIC) for metric in ("before", METRIC)), other]
        line += differences(*found.get((cell, other), (None, None)))
        line += [plus_minus(by_metric[metric].get(cell), metric) for metric in LOSSES]
        lines.append(line + [f"{sum(row[count] for row in own) / len(own):.1f}" for count in COUNTS[:2]])
        lines[-1].append(f"{sum(row['diverged'] for row in own):.0f}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differences(comparison: Comparison | None, corrected: float | None) -> list[str]:
    """Mean difference, p, and p corrected; empty where there is none."""
    if comparison is None or comparison.mean is None:
        return ["", "", ""]
    chances = ["" if p is None else chance(p).removeprefix("= ") for p in (comparison.p, corrected)]
    return [signed(comparison.mean, comparison.deviation), *chances]


def room_table(grid: Grid, rows: list[dict]) -> str:
    """A line for each arm: the largest values of any run, layer and record, and how far they are from fp16's end."""
    heads = ["arm", "activation", "65,504 over it", "router's logit", "gradient", "gradient x loss scale"]
    lines = [[*heads, "last loss scale", "not finite first"], ["---"] * (len(heads) + 2)]
    for cell in cells_with_results(grid, rows):
        own = [row for row in rows if row["cell"] == cell]
        found = [max(top(row, points) for row in own) for points in (ACTIVATIONS, LOGITS, GRADIENTS)]
        activation, logit, gradient = map(amount, found)
        line = [cell, activation, amount(LARGEST_FP16 / found[0]), logit, gradient]
        scales = sorted({row["loss_scales"][-1] for row in own if "loss_scales" in row})
        line.append(amount(max(top(row, GRADIENTS, scaled=True) for row in own)) if scales else "")
        line.append(" to ".join(f"{scale:,.0f}" for scale in dict.fromkeys((*scales[:1], *scales[-1:]))))
        lines.append([*line, "; ".join(dict.fromkeys(place for row in own if (place := first_break(row)[1])))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def amount(value: float) -> str:
    """Three digits: `9,030`, `0.0123`."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def findings(grid: Grid, rows: list[dict]) -> str:
    """A line for each claim of the grid that has been run, with what it comes to."""
    found = comparisons(grid, rows)
    lines = []
    for claim in grid.claims:
        comparison, corrected = found.get((claim["better"], claim["worse"]), (None, None))
        if comparison is None or comparison.mean is None:
            continue
        p = "" if corrected is None else f", p, Holm {chance(corrected)}"
        size = signed(comparison.mean, comparison.deviation)
        seeds = "1 seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
        lines.append(f"- {claim['says'].capitalize()}: **{size}** bits per fact ({seeds}{p}).")
    return "\n".join(lines)


def not_run(grid: Grid, rows: list[dict]) -> str:
    """A sentence about arms that the grid declares and that have no result; empty where all have."""
    lacking = [cell for cell in grid.cells if cell not in cells_with_results(grid, rows)]
    return f"Declared and not yet run: {', '.join(lacking)}." if lacking else ""


def page(grid: Grid, rows: list[dict]) -> str:
    """The whole document."""
    parts = [HEAD, grid.question.strip(), arms_table(grid, rows), not_run(grid, rows), findings(grid, rows)]
    parts = [part for part in parts if part]
    parts += [f"![Where 16 bits break]({PICTURE})", ROOM, room_table(grid, rows), LESSONS, HISTORY]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    options = page_options(__doc__)
    grid = load_grid(HERE / "sixteen_bits.yaml")
    rows = rows_of(options, DATA, partial(gather, grid=grid))
    (options.docs / PAGE).write_text(page(grid, rows))
    draw(grid, rows, options.docs / PICTURE)
    print(f"{len(rows)} rows -> {options.docs / PAGE}")


if __name__ == "__main__":
    main()
