"""Grids of runs: what is shared, what is repeated, in which order, and what the results say."""

import json
import os
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.experiments.curves import curve_numbers, loss_spikes
from megatron_moellava.experiments.grid import load_grid
from megatron_moellava.experiments.nodes import finished, overrides_of, resolve, run_node
from megatron_moellava.experiments.results import collect, compare, summarise, verdict, write_results
from megatron_moellava.experiments.schedule import Scheduler, core_shares
from megatron_moellava.experiments.tables import claims_table, findings, paper_table, plot, plot_curves, report, table
from tests.helpers.paths import REPO

GRIDS = sorted((REPO / "examples/ablations").glob("*.yaml"))
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


@pytest.fixture
def grid(tmp_path):
    return made(tmp_path)


def made(folder: Path, text: str = GRID, base: str = BASE, **options):
    (folder / "base.yaml").write_text(base)
    (folder / "grid.yaml").write_text(text)
    return load_grid(folder / "grid.yaml", **options)


def names(grid, cell: str, seed: int = 1) -> list[str]:
    return [node.name for node in grid.chain(cell, seed)]


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_cells_share_what_they_have_in_common(grid):
    four, two, slow, dense, early = (names(grid, cell) for cell in grid.cells)
    assert [name.split("-")[0] for name in four] == ["prepare", "stage2", "upcycle", "stage3"]
    assert four[:2] == two[:2] == dense[:2] == early
    assert four[2] == slow[2] != two[2]
    assert len({four[-1], two[-1], slow[-1], dense[-1]}) == 4
    assert len(dense) == 3


def test_seeds_share_nothing(grid):
    assert not set(names(grid, "four", 1)) & set(names(grid, "four", 2))


def test_a_change_reaches_everything_behind_it_and_nothing_before(tmp_path):
    before = names(made(tmp_path), "four")
    after = names(made(tmp_path, base=BASE.replace("steps: 100", "steps: 101")), "four")
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_steps_scale_shortens_every_training(tmp_path):
    chain = made(tmp_path, steps_scale=0.05).chain("four", 1)
    assert [node.settings.get("steps") for node in chain] == [None, 5, None, 2]


def test_shipped_grids_train_as_fast_as_the_quickstart_and_their_arms_as_long():
    plan = runpy.run_path(str(REPO / "examples/quickstart/run.py"))["PLAN"]
    grid = load_grid(REPO / "examples/ablations/strategy.yaml")
    chains = {cell: {node.step: node.settings for node in grid.chain(cell, 1)} for cell in grid.cells}
    staged = chains["moe-in-stage-3"]
    for stage in ("stage1", "stage2", "stage3"):
        assert staged[stage]["set"]["optimizer"]["lr"] == plan[stage]["lr"]
    for stage in ("stage2", "stage3"):
        assert staged[stage]["steps"] == pytest.approx(plan[stage]["steps"] / 3, rel=0.05)
    together = staged["stage2"]["steps"] + staged["stage3"]["steps"]
    assert {chains[cell]["stage3"]["steps"] for cell in ("moe-from-stage-2", "dense-one-stage")} == {together}
    assert chains["dense-continued"]["stage3"]["steps"] == staged["stage3"]["steps"]


def test_shipped_grids_hold_the_papers_tables():
    cells = {path.stem: set(load_grid(path).cells) for path in GRIDS}
    assert cells["experts"] == {"1", "2", "4", "8"}
    assert cells["aux_loss"] == {"0", "0.001", "0.01", "0.1"}
    assert {
        "placement",
        "capacity",
        "strategy",
        "tuned",
        "topk",
        "router",
        "router_init",
        "size",
        "stability",
    } <= cells.keys()


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_end_in_stage_3_and_share_their_start(path):
    grid = load_grid(path)
    assert len(grid.seeds) >= 3
    chains = [grid.chain(cell, 1) for cell in grid.cells]
    assert {chain[-1].step for chain in chains} == {"stage3"}
    starts = {tuple(node.name for node in chain[:2]) for chain in chains}
    assert len(starts) == (2 if path.stem == "size" else 1)
    assert set(grid.paper.get("rows", {})) or not grid.paper


@pytest.mark.parametrize("option", ["--jobs", "--processes", "--steps-scale"])
def test_nothing_runs_with_a_number_that_makes_no_sense(option, tmp_path, capsys):
    main = runpy.run_path(str(REPO / "tools/ablate.py"))["main"]
    assert main([str(GRIDS[0]), option, "0", "--runs", str(tmp_path / "runs")]) == 2
    assert f"{option} 0" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_the_array_script_reads_its_settings_from_the_grid():
    command = [sys.executable, "tools/ablate.py", "examples/ablations/cluster/stage3.yaml", "--shell", "4"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}
    )
    assert result.returncode == 0, result.stderr
    script = result.stdout + 'echo "$NAME"; printf "%s\n" "${UPCYCLE[@]}" "${SETTINGS[@]}"'
    words = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout.split("\n")
    assert words[0] == "top-1"
    assert words[words.index("--topk") + 1] == "1"
    assert {"moe.moe_router_topk=1", "moe.num_moe_experts=4", "training.seed=42"} <= set(words)


@pytest.mark.parametrize("text, message", [
    (GRID.replace("baseline: four", "baseline: five"), "baseline='five' is no cell"),
    (GRID.replace("upcycle.moe", "upcicle.moe"), "changes no step; steps are prepare, stage2"),
    (GRID.replace("better: four", "better: five"), "claims[0].better='five' is no cell; cells are four, two"),
    (GRID.replace("says: four", "say: four"), "claims[0] needs better, says, worse, and nothing else"),
    (GRID + "\nseed: 3", "seed is not known; did you mean seeds"),
    (GRID.replace("end: stage2", "end: stage4"), "stage4 is no step"),
    (GRID + "\nsteps: {upcycle: {experts: 3}}", "steps.upcycle.experts is not known"),
    (GRID + "\nsteps: {more: {kind: fly}}", "steps.more.kind='fly' must be one of command, train"),
    ("baseline: a", "needs `steps` and `cells`"),
])  # fmt: skip
def test_a_wrong_grid_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        made(tmp_path, text)
    assert message in str(error.value)


def test_a_config_that_is_not_there_is_named_before_anything_runs(tmp_path):
    grid = made(tmp_path, GRID + "\nsteps: {stage2: {config: '{here}/recipe.yaml'}}")
    with pytest.raises(ConfigError, match=r"config {here}/recipe.yaml is no file: .*{here} is the folder of the grid"):
        grid.chain("four", 1)


# --- running ----------------------------------------------------------------------------------------------------------

FAKE = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "order.txt", "a") as file:
    file.write(folder.name + "\\n")
if sys.argv[2] in folder.name:
    sys.exit(7)
unfinished = folder / "done.tmp"
cores = sorted(os.sched_getaffinity(0))
unfinished.write_text(json.dumps({"numbers": {"accuracy": float(len(folder.name)), "cores": cores}}))
unfinished.rename(folder / "done.json")
"""


def scheduler(grid, runs: Path, jobs: int = 2, broken: str = "nothing") -> Scheduler:
    return Scheduler(grid, runs, lambda node: [sys.executable, "-c", FAKE, str(runs / node.name), broken], jobs=jobs)


def test_every_node_runs_once_after_what_it_needs(grid, tmp_path, capsys):
    chains = [grid.chain(cell, seed) for cell, seed in grid.runs()]
    runs = tmp_path / "runs"
    assert scheduler(grid, runs, jobs=3).run(chains) == 0
    order = (runs / "order.txt").read_text().split()
    assert len(order) == len(set(order)) == len({node.name for chain in chains for node in chain})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{len(order)} steps to run, 3 at a time")
    counts = [int(line.split()[0]) for line in said if line.endswith(f"of {len(order)} steps ended")]
    assert counts == sorted(set(counts)) and counts[-1] == len(order)
    for chain in chains:
        for node in chain:
            assert all(order.index(need.name) < order.index(node.name) for need in node.needs())
    assert scheduler(grid, runs).run(chains) == 0
    assert (runs / "order.txt").read_text().split() == order, "something finished was run again"
    assert capsys.readouterr().out == "", "nothing was left to do"


def test_a_failure_stops_what_needs_it_and_nothing_else(grid, tmp_path, capsys):
    runs = tmp_path / "runs"
    chains = [grid.chain(cell, 1) for cell in grid.cells]
    broken = grid.chain("two", 1)[2]
    assert scheduler(grid, runs, broken=broken.name).run(chains) == 1
    assert finished(runs, grid.chain("four", 1)[-1]) is not None
    assert finished(runs, grid.chain("two", 1)[-1]) is None
    said = capsys.readouterr().out
    assert f"{broken.name}: exit code 7" in said
    assert f"{grid.chain('two', 1)[-1].name}: not run" in said


def test_a_command_gets_its_settings_and_its_folder(grid, tmp_path):
    node = grid.chain("four", 3)[0]
    run_node(grid, tmp_path, node)
    assert (tmp_path / node.name / "data.json").read_text() == "red 3"
    assert finished(tmp_path, node)["seed"] == 3
    stage2 = grid.chain("four", 3)[1]
    assert resolve(grid, tmp_path, stage2, "data") == str(tmp_path / node.name / "data.json")


def test_settings_become_overrides():
    tree = {"optimizer": {"lr": 0.1, "clip_grad": 0}, "training": {"trains": ["projector"]}}
    assert overrides_of(tree) == ["optimizer.lr=0.1", "optimizer.clip_grad=0", 'training.trains=["projector"]']


# --- results ----------------------------------------------------------------------------------------------------------


def rows_of(grid, values: dict[str, list[float]]) -> list[dict]:
    return [
        {"grid": "grid", "cell": cell, "seed": seed, "accuracy": value, "final_loss": 0.5}
        for cell, own in values.items()
        for seed, value in enumerate(own, start=1)
    ]


def test_paired_test_sees_what_unpaired_noise_hides():
    base, better = {1: 60.0, 2: 70.0, 3: 80.0}, {1: 61.0, 2: 71.1, 3: 80.9}
    result = compare("base", better, base)
    assert result.mean == pytest.approx(1.0)
    assert result.deviation == pytest.approx(0.1)
    assert result.p == pytest.approx(0.0033, abs=1e-4)  # t = 17.3 with 2 degrees of freedom
    assert statistics.stdev(base.values()) > 5


def test_missing_seeds_are_left_out_of_the_pairs():
    assert compare("base", {1: 1.0, 2: 5.0}, {2: 4.0, 3: 1.0}).seeds == 1
    assert compare("base", {1: 1.0}, {1: 1.0}).p is None
    assert compare("base", {1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p is None


def test_table_has_only_what_was_run(grid):
    rows = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [59.0, 60.1, 61.2]})
    text = table(grid, rows)
    assert "| **four** | 3 | 61.00 ± 1.00 |" in text
    assert "| two | 3 | 60.10 ± 1.10 | -0.90 ± 0.10 | 0.004 | 0.5000 |" in text
    assert "slow" not in text and "diverged" not in text
    (sentence,) = findings(grid, rows)
    assert "beyond the noise, p = 0.004" in sentence
    assert "| four | 61.5 |" in paper_table(grid) and "| two |  |" in paper_table(grid)
    assert "## grid" in report(grid, rows, "plot.png")


def test_a_small_effect_is_called_noise(grid):
    rows = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [61.0, 60.0, 62.1]})
    assert "cannot" not in findings(grid, rows)[0] and "no difference" in findings(grid, rows)[0]


def test_other_metrics_are_spoken_of_when_they_differ(tmp_path):
    grid = made(tmp_path, GRID + "metrics: [accuracy, max_load]\n")
    rows = rows_of(grid, {"four": [60.0, 61.0, 62.0], "two": [61.0, 60.0, 62.1]})
    for row, load in zip(rows, [1.1, 1.2, 1.3, 1.6, 1.7, 1.81], strict=True):
        row["max_load"] = load
    accuracy, load = findings(grid, rows)
    assert "accuracy" in accuracy and "no difference" in accuracy
    assert "max_load +0.50" in load and "beyond the noise" in load


def test_results_are_collected_from_the_nodes_and_drawn(grid, tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2):
        node = grid.chain("four", seed)[-1]
        (runs / node.name).mkdir(parents=True)
        (runs / node.name / "done.json").write_text(json.dumps({"numbers": {"accuracy": 60.0 + seed}}))
    rows = collect(grid, runs)
    write_results(runs / "grid", rows)
    assert [row["seed"] for row in map(json.loads, (runs / "grid/results.jsonl").open())] == [1, 2]
    assert summarise(grid, rows, "accuracy")[0].mean == 61.5
    plot(grid, rows, runs / "plot.png")
    assert (runs / "plot.png").stat().st_size > 2000


@pytest.mark.parametrize(("four", "two", "words"), [
    ([60.0, 61.0, 62.0], [59.0, 60.1, 61.2], "held"),
    ([59.0, 60.1, 61.2], [60.0, 61.0, 62.0], "the reverse"),
    ([60.0, 61.0, 62.0], [61.0, 60.0, 62.1], "not told from noise (other direction)"),
    ([60.0, 61.0, 62.0], [59.0, 61.0, 61.9], "not told from noise (same direction)"),
    ([60.0, 61.0, 62.0], [60.0, 61.0, 62.0], "equal in every seed"),
])  # fmt: skip
def test_a_claim_of_the_paper_gets_a_verdict(grid, four, two, words):
    rows = rows_of(grid, {"four": four, "two": two})
    assert verdict(grid, rows, grid.claims[0])[1] == words
    text = claims_table([(grid, rows)])
    assert f"| four rather than two | **{words}** | accuracy |" in text
    assert f"Of 1 findings {int(words == 'held')} held here, {int(words == 'the reverse')} came out" in text


def test_lower_losses_are_better(grid, tmp_path):
    by_loss = made(tmp_path, GRID + "metrics: [held_out_loss]\n")
    rows = [{**row, "held_out_loss": row["accuracy"]} for row in rows_of(grid, {"four": [1, 2, 3], "two": [2, 3.1, 4]})]
    assert verdict(by_loss, rows, grid.claims[0])[1] == "held"
    assert verdict(by_loss, rows[:3], grid.claims[0]) is None, "a cell is missing"


def test_a_cell_has_one_place_in_every_panel_also_where_it_lacks_a_metric(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    grid = made(tmp_path, GRID + "metrics: [accuracy, max_load]\n")
    rows = rows_of(grid, {"four": [60.0, 61.0], "two": [61.0, 60.0]})
    for row in rows[2:]:
        row["max_load"] = 1.5
    plot(grid, rows, tmp_path / "plot.png")
    panels = plt.gcf().axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["four", "two"]
    for panel in panels:
        places = [place for line in panel.lines for place in line.get_ydata() if line.get_marker() == "."]
        assert all(-0.5 < place < 1.5 for place in places) and panel.get_ylim() == (1.5, -0.5)
    assert set(places) == {1.18}, "the load is that of the second cell"
    monkeypatch.undo()
    plt.close("all")


def test_a_misspelt_metric_is_named_with_those_that_there_are(tmp_path):
    grid = made(tmp_path, GRID + "metrics: [accuracy, acuracy]\n")
    text = report(grid, rows_of(grid, {"four": [60.0, 61.0], "two": [61.0, 60.0]}))
    assert "No finished run has acuracy. `metrics` can be: accuracy, final_loss." in text
    known = made(tmp_path, GRID)
    assert "No finished run" not in report(known, rows_of(known, {"four": [60.0]}))


def test_curves_have_a_panel_for_each_cell_with_the_baseline_behind(grid, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    rows = [row | {"node": f"{row['cell']}-{row['seed']}"} for row in rows_of(grid, {"four": [1, 2], "two": [3, 4]})]
    for row in rows:
        (tmp_path / row["node"]).mkdir()
        lines = [{"iteration": step, "loss": row["accuracy"] / step} for step in (1, 2, 3)]
        (tmp_path / row["node"] / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(grid, rows, tmp_path, tmp_path / "curves.png")
    shown = [panel for panel in plt.gcf().axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown] == ["four", "two"]
    assert [next(iter(line.get_ydata())) for line in shown[1].lines] == [1, 2, 3, 4]
    assert (tmp_path / "curves.png").stat().st_size > 2000
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_job_runs_on_its_own_cores(grid, tmp_path, jobs):
    chains = [grid.chain(cell, seed) for cell, seed in grid.runs()]
    mine = os.sched_getaffinity(0)
    assert scheduler(grid, tmp_path, jobs=jobs).run(chains) == 0
    used = [set(finished(tmp_path, chain[-1])["numbers"]["cores"]) for chain in chains]
    assert all(cores in core_shares(mine, jobs) for cores in used)
    assert os.sched_getaffinity(0) == mine, "the caller keeps its cores"


def test_cores_are_dealt_out_among_the_jobs():
    assert core_shares({0, 1, 2, 3, 4}, 2) == [{0, 2, 4}, {1, 3}]
    assert core_shares({6, 7}, 3) == [{6}, {7}, {6}], "more jobs than cores share them"


# --- curves -----------------------------------------------------------------------------------------------------------


def test_a_spike_counts_once_however_long_it_lasts():
    calm = [1.0] * 40
    assert loss_spikes(calm) == 0
    assert loss_spikes([*calm, 3.0, 3.0, 2.5, *calm[:30]]) == 1
    assert loss_spikes([*calm, 3.0, *calm[:5], float("nan"), *calm[:5]]) == 2
    assert loss_spikes([0.01] * 40 + [0.05]) == 0  # five times as much, and nothing
    assert loss_spikes([8.0, 3.0, 9.0, *calm]) == 0  # the first steps have nothing to be compared with


def test_numbers_of_a_run_come_from_its_logs(tmp_path):
    steps = [
        {"iteration": i, "loss": 2.0 - i / 100, "grad_norm": 1.0, "skipped": float(i == 0), "step_seconds": 6.0}
        for i in range(100)
    ]
    steps[0]["loss"] = float("nan")
    layer = {"layer": 0, "choices": [900, 100, 0, 0], "dropped": [0, 0, 0, 0], "max_load": 3.6, "entropy": 0.3}
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "routing.jsonl").write_text(json.dumps({"iteration": 50, "layers": [layer]}) + "\n")
    numbers = curve_numbers(tmp_path)
    assert numbers["final_loss"] == pytest.approx(1.055)  # of the last ten
    assert numbers["peak_loss"] == 1.99  # the loss of the skipped step is no number
    assert (numbers["skipped_steps"], numbers["train_minutes"], numbers["max_load"]) == (1, 10.0, 3.6)
    assert numbers["dead_experts"] == 2
