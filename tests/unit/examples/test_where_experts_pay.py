"""The page "where experts pay" is made of the data beside it, and of nothing else."""

import itertools
import statistics
from functools import partial

from megatron_moellava.experiments.grid import load_grid

PROGRAM = "where_experts_pay"


def test_the_page_is_what_the_data_give(program, rows, written):
    grids = [load_grid(program.HERE / f"{name}.yaml") for name in program.GRIDS]
    assert rows and written == program.page(grids, rows)
    cells = {grid.name: set(grid.cells) for grid in grids}
    assert all(row["cell"] in cells[row["grid"]] and row["bits_per_fact"] > 0 for row in rows)


def test_what_the_page_says_is_true_of_the_data(program, rows):

    def bits(grid, cell):
        return statistics.fmean(row["bits_per_fact"] for row in rows if (row["grid"], row["cell"]) == (grid, cell))

    much, few = partial(bits, "knowledge"), partial(bits, "knowledge_few")
    assert much("top-1 of 8") < much("top-2 of 4, as the paper") < much("top-1 of 8, recipe's roles") < much("dense")
    assert few("top-1 of 8") < few("dense") < few("top-1 of 8, recipe's roles")
    won = (much("dense") - much("top-1 of 8, recipe's roles")) / (much("dense") - much("top-1 of 8"))
    assert 0.4 < won < 0.6
    assert abs(much("top-2 of 16, half width") - much("dense")) < 0.3
    assert much("top-1 of 8, half redrawn") > much("top-1 of 8, a quarter redrawn") > much("dense") + 1
    numbers = [bits("knowledge_experts", number) for number in ("1", "2", "4", "8", "16")]
    assert all(0.8 < fewer - more < 1.4 for fewer, more in itertools.pairwise(numbers))
    active, when, capacity = (partial(bits, f"knowledge_{name}") for name in ("topk", "strategy", "capacity"))
    assert active("top-2") < active("top-1") < active("top-4")
    assert when("experts from the start") < when("experts last") - 3
    assert when("dense in one stage") < when("dense in two stages")
    assert capacity("capacity 1.0") < capacity("capacity 1.5") == capacity("no limit")
    longer = partial(bits, "knowledge_longer")
    slow = [longer(arm) for arm in ("top-2 of 16, half width", "top-1 of 8, a quarter redrawn")]
    assert longer("top-1 of 8") + 3 < min(slow) <= max(slow) < longer("dense") - 0.5
    assert longer("dense") + 2 < longer("top-1 of 8, half redrawn")
    vendors = partial(bits, "knowledge_vendors")
    assert 2.7 < vendors("dense") - vendors("top-1 of 8") < 2.9
    place, wide = partial(bits, "knowledge_placement"), partial(bits, "knowledge_size")
    assert 0.3 < place("every other layer") - place("second half") < 0.5
    assert abs(place("every other layer") - place("first half")) < 0.05
    assert 0.7 < place("every other layer") - place("all layers") < 0.9
    assert 4 < wide("dense") < 5 and 0.05 < wide("dense") - wide("top-1 of 8") < 0.15
    length = partial(bits, "knowledge_length")
    gaps = [length(f"dense-{steps}") - length(f"moe-{steps}") for steps in (75, 150, 300)]
    assert 0 < gaps[0] < gaps[1] < gaps[2]
    taught = partial(bits, "knowledge_distilled")
    assert all(abs(taught(f"weight {weight}") - taught("top-1 of 8")) < 0.1 for weight in (0.5, 0.9))
    assert taught("weight 0.9, temperature 3") > taught("top-1 of 8") + 1
    assert taught("the teacher") < 1 / 28
    teacher = next(row for row in rows if row["cell"] == "the teacher")["parameters"]
    student = next(row for row in rows if (row["grid"], row["cell"]) == ("knowledge_distilled", "top-1 of 8"))
    assert (
        round(teacher / student["activated_parameters"], 1) == 3.7 and round(teacher / student["parameters"], 1) == 1.4
    )
    cost = {row["cell"]: row["mflops_per_token"] for row in rows if row["grid"] == "knowledge"}
    assert cost["top-1 of 8"] / cost["dense"] < 1.01 < 1.3 < cost["top-2 of 4, as the paper"] / cost["dense"] < 1.35


def test_a_grid_of_which_only_one_arm_has_run_is_shown_without_a_verdict(program, rows):
    grids = [load_grid(program.HERE / "knowledge.yaml")]
    alone = [row for row in rows if (row["grid"], row["cell"]) == ("knowledge", "dense")]
    text = program.page(grids, alone)
    assert "| **dense** | 3 |" in text and "Experts pay: a fact" not in text
