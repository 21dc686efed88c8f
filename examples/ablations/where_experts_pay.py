"""The page "where experts pay" and its picture, from results that are in the repository as data.

  python examples/ablations/where_experts_pay.py --runs runs/ablations     take what is finished there into the data, then write
  python examples/ablations/where_experts_pay.py                           write page and picture from the data alone

The data: docs/measurements/data/where_experts_pay.jsonl, a row for each cell and seed of the grids below, with its curve.
"""

from functools import partial
from pathlib import Path

from experts_picture import METRIC, draw
from pages import HERE, binned, chance, page_options, rows_of, signed

from megatron_moellava.experiments.curves import read_lines
from megatron_moellava.experiments.grid import Grid, load_grid
from megatron_moellava.experiments.results import LEVEL, collect, compare, holm, judge, summarise
from megatron_moellava.experiments.tables import plus_minus

DATA, PAGE, PICTURE = "data/where_experts_pay.jsonl", "where_experts_pay.md", "images/where_experts_pay.png"
GRIDS = (
    "knowledge",
    "knowledge_few",
    "knowledge_pictures",
    "knowledge_vendors",
    "knowledge_size",
    "knowledge_experts",
    "knowledge_topk",
    "knowledge_placement",
    "knowledge_strategy",
    "knowledge_capacity",
    "knowledge_length",
    "knowledge_longer",
    "knowledge_lr",
    "knowledge_distilled",
)
KEPT = (  # of a run's numbers
    METRIC,
    "mflops_per_token",
    "activated_parameters",
    "parameters",
    "final_loss",
    "max_load",
    "train_minutes",
    "steps",
    "diverged",
)

HEAD = """# Where experts pay

Experts give a model parameters that most tokens do not pay for. What parameters hold are facts; so experts should pay where
there is more to know than the dense model can hold, and nowhere else. On easy-VQA, a task of perception that the dense
model solves, they add nothing ([the quickstart](../../README.md#what-the-quickstart-does), [ablations](ablations.md)). Here
is the other side.

The task is to know names by heart: what things (emoji) are called in eight languages, by Unicode's CLDR. Perception is made
trivial: a thing is a patch of noise, always the same but for fresh noise on top, so that a run takes minutes
(`examples/ablations/facts.py`). The model is a Llama of 2 layers of 64 with FFNs of 128 and a vocabulary of 1,024, 0.21 M
parameters; the trainer, the upcycling and the routers are those of every other run. It is asked from views that it was
never trained on, and what counts is bits per fact: what the true name still costs the model, given the names before it; a
name that is known costs none.

```bash
moellava ablate examples/ablations/knowledge.yaml --jobs 2                       # run or continue; likewise knowledge_*.yaml
python examples/ablations/where_experts_pay.py --runs runs/ablations             # this page
```

This page is made from `data/where_experts_pay.jsonl`, which holds the result and the curve of every run. Numbers are means
± standard deviation over seeds. Differences are of the same seed, which shares data, weights and stage II; p is of a
two-sided paired t-test. MFLOPs are those of a token's forward pass through decoder and output layer."""

FINDINGS = """## The paper's findings, on knowledge

What the paper's ablations say, and what the grids above say of it. p is corrected for all of these comparisons together
(Holm). On easy-VQA none of them could be told from noise ([ablations](ablations.md))."""

# What a test holds to the data (tests/unit/examples/test_where_experts_pay.py).
LESSONS = """## What they say

- **Experts pay where there is much to know.** With one of eight experts for each token, a token passes through no more FLOPs
  than in the dense model, and a fact costs fewer bits.
- **More experts and a longer stage III pay more.** Each doubling of the experts, from one to sixteen, saves about a bit of a
  fact at equal FLOPs, and the distance to the dense model grows with stage III's length.
- **What stage III trains decides as much.** The recipe's stage III leaves attention, embeddings and norms as stage II left
  them; the dense model continued trains everything. Where the dense model learns slowly (eight thousand facts) the recipe's
  MoE wins all the same, by half as much as one that trains everything; where it learns fast (two thousand facts) what is
  frozen costs more than the experts bring.
- **With pictures it is the same.** The quickstart asks for four thousand facts about real pictures, through a pretrained tower,
  and experts pay there, too, in each of three seeds ([its page](../tutorials/quickstart.md)). So they do when three vendors'
  pictures train and a fourth's, in another style, are asked about: by 2.8 bits of a fact. But of that style so small a tower
  tells only 5 to 7 % of the things apart: what is known there are mostly names that follow from those before them in the
  answer. Where the dense model is large enough to have learned the facts, experts do not pay, as the quickstart's page says.
- **The paper's two of four experts** beat the dense model, at 1.3 times its FLOPs, by less than one of eight.
- **How many layers have experts matters more than which.** Of four layers two with experts hold as many parameters wherever
  they are. In the second half they leave 0.4 bits less of a fact than in every other layer, the paper's choice; in the first
  half as much. In all four layers they leave 0.8 less, at the same FLOPs per token.
- **A model that holds the facts itself hardly needs them.** At twice the width 4.5 bits are left of a fact, and experts save
  a tenth of one.
- **Of the paper's findings those about experts hold, those about stages do not.** Two experts are better than one, and two
  active ones better than one. But here nothing is pretrained: the language model is random when stage II begins, and what is
  trained longest has learned most. Experts from the first step on know much more than experts of the last fifth of the
  steps, and one dense stage more than two, whose learning rate falls to zero in between. All four active are worse than two,
  at more FLOPs. What a capacity of 1.0 drops does no harm; 1.5 drops nothing here.
- **Finer experts and redrawn columns need a longer stage III.** After 150 steps sixteen experts of half the width are as good
  as the dense model, no better: the two parts of a copy are chosen together until their rows in the router have come apart.
  Redrawing half or a quarter of each copy's columns forgets more than so short a stage III learns. Given twice the steps, the
  narrow experts and a quarter redrawn beat the dense model, half redrawn is still behind it, and none comes near plain copies
  of whole experts.
- **A teacher does not help here.** At equal steps the MoE that learns from a teacher knows as much as the one without, whatever
  the weight. The teacher knows the facts (a thirtieth of a bit is left of each), so that what it thinks likely is the label
  over again; what the student lacks is steps and not better targets. At a temperature of 3, which flattens what both are
  sure of, the student learns less of them in as many steps."""


# --- the data -------------------------------------------------------------------------------------------------------------


def gather(runs: Path, grids: list[Grid]) -> list[dict]:
    """What is finished below `runs`, with the mean training loss of each thirtieth of the steps.

    `exposures`: how often each fact was trained on in the last stage.
    """
    rows = []
    for grid in grids:
        for row in collect(grid, runs):
            own = {key: row[key] for key in ("grid", "cell", "seed", *KEPT) if key in row}
            steps = read_lines(runs / row["node"] / "steps.jsonl")
            things = grid.chain(row["cell"], row["seed"])[0].settings["things"]
            own["exposures"] = round(sum(step["samples"] for step in steps) / things, 2)
            rows.append(own | {"curve": [round(value, 4) for value in binned([step["loss"] for step in steps])]})
    return rows


# --- the page -------------------------------------------------------------------------------------------------------------


def arms_table(grid: Grid, rows: list[dict]) -> str:
    """Bits per fact of every arm, what a token costs in it, and its difference from the baseline by a corrected paired test."""
    found = summarise(grid, rows, METRIC)
    tested = [item for item in found if item.against is not None and item.against.p is not None]
    corrected = dict(zip((item.cell for item in tested), holm([item.against.p for item in tested]), strict=True))
    head = (
        "| arm | seeds | bits per fact | difference | p | p, Holm | MFLOPs per token | M parameters, activated / all |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for item in found:
        own = [row for row in rows if row["cell"] == item.cell]
        against = item.against
        cells = [
            f"**{item.cell}**" if item.cell == grid.baseline else item.cell,
            str(len(own)),
            plus_minus(item, METRIC),
        ]
        cells.append("" if against is None or against.mean is None else signed(against.mean, against.deviation))
        cells.append("" if against is None or against.p is None else chance(against.p).removeprefix("= "))
        cells.append(chance(corrected[item.cell]).removeprefix("= ") if item.cell in corrected else "")
        cells += [
            f"{own[0]['mflops_per_token']:.3f}",
            f"{own[0]['activated_parameters']:.2f} / {own[0]['parameters']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs_table(grid: Grid, rows: list[dict]) -> str:
    """A line for each cell that is compared with another: both, and their paired difference."""
    by_cell = {item.cell: item for item in summarise(grid, rows, METRIC)}
    lines = ["| | seeds | dense, continued | MoE | MoE - dense | p |", "|---|---|---|---|---|---|"]
    for cell, item in by_cell.items():
        other = by_cell.get(grid.against.get(cell, ""))
        if other is None:
            continue
        found = compare(other.cell, item.values, other.values)
        mean = "" if found.mean is None else signed(found.mean, found.deviation)
        cells = [cell.removeprefix("moe-").replace("-", " "), str(found.seeds), plus_minus(other, METRIC)]
        cells += [plus_minus(item, METRIC), mean, "" if found.p is None else chance(found.p).removeprefix("= ")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def headline(grid: Grid, rows: list[dict]) -> str:
    """What the first claim of the grid comes to: "**A leaves x bits ..., B y: ...**"."""
    claim = grid.claims[0]
    by_cell = {item.cell: item for item in summarise(grid, rows, METRIC)}
    moe, dense = by_cell[claim["better"]], by_cell[claim["worse"]]
    found = compare(dense.cell, moe.values, dense.values)
    tested = [item.against.p for item in by_cell.values() if item.against is not None and item.against.p is not None]
    words, p = "One seed so far" if found.p is None else "Not told from noise", ""
    if found.p is not None and found.mean is not None:
        corrected = holm(tested)[tested.index(found.p)]
        if corrected < LEVEL:
            words = "Experts pay" if found.mean < 0 else "Experts cost"
        p = f", p {chance(found.p)}"
        p += f", corrected for {len(tested)} comparisons {chance(corrected)}" if len(tested) > 1 else ""
    difference = "" if found.mean is None else signed(found.mean, found.deviation)
    seeds = "1 seed" if found.seeds == 1 else f"{found.seeds} seeds"
    return (
        f"**{words}: a fact costs the MoE ({moe.cell}) {plus_minus(moe, METRIC)} bits, and the dense model continued for as "
        f"long, at equal FLOPs per token, {plus_minus(dense, METRIC)}: {difference} ({seeds}{p}).**"
    )


def findings_table(grids: list[Grid], rows: list[dict]) -> str:
    """Every claim that two seeds can judge: which way it came out, by how much, and p corrected for the number of claims."""
    judged = judge([(grid, [row for row in rows if row["grid"] == grid.name]) for grid in grids])
    lines = ["| finding | here | seeds | better - worse, bits per fact | p | p, Holm |", "|---|---|---|---|---|---|"]
    for item in judged:
        comparison = item.comparison
        cells = [item.says, f"**{item.word}**", str(comparison.seeds), signed(comparison.mean, comparison.deviation)]
        cells += ["" if value is None else chance(value).removeprefix("= ") for value in (comparison.p, item.p)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(grids: list[Grid], rows: list[dict]) -> str:
    """The whole document."""
    parts = [HEAD, f"![Where experts pay]({PICTURE})"]
    for grid in grids:
        own = [row for row in rows if row["grid"] == grid.name]
        if not own:
            continue
        parts += [f"## {grid.title}", grid.question.strip()]
        first = grid.claims[0] if grid.claims else {}
        if first.get("worse") == "dense" and {"dense", first["better"]} <= {row["cell"] for row in own}:
            parts.append(headline(grid, own))
        parts.append(pairs_table(grid, own) if grid.against else arms_table(grid, own))
    parts += [FINDINGS, findings_table(grids, rows), LESSONS]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = page_options(__doc__)
    grids = [load_grid(HERE / f"{name}.yaml") for name in GRIDS if (HERE / f"{name}.yaml").exists()]
    rows = rows_of(options, DATA, partial(gather, grids=grids))
    (options.docs / PAGE).write_text(page(grids, rows))
    draw({grid.name: grid for grid in grids}, rows, options.docs / PICTURE)
    print(f"{len(rows)} rows -> {options.docs / PAGE}")


if __name__ == "__main__":
    main()
