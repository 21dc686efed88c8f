"""Grids of runs: what is shared, what is repeated, in which order, and what the results say."""

import os
import runpy
import subprocess
import sys

import pytest

from megatron_moellava.config import ConfigError
from megatron_moellava.experiments.grid import load_grid
from megatron_moellava.experiments.nodes import resolve
from tests.helpers.grids import BASE, GRID, made
from tests.helpers.paths import REPO

GRIDS = sorted((REPO / "examples/ablations").glob("*.yaml"))


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


def test_a_training_reads_the_logits_that_another_step_has_written(tmp_path):
    changes = "{stage3.teacher: logits/x, stage3.set.training.distillation.weight: 0.9}"
    text = GRID.replace("  early: {end: stage2}", f"  taught: {changes}")
    logits = "  logits: {kind: command, command: [make, '{from}'], from: stage2, data: prepare/data.json}\n"
    grid = made(tmp_path, text, base=f"{BASE}{logits}end: stage3\n")
    four, taught = grid.chain("four", 1), grid.chain("taught", 1)
    assert [node.step for node in taught] == ["prepare", "stage2", "upcycle", "logits", "stage3"]
    assert taught[:3] == four[:3] and taught[-1].digest != four[-1].digest
    assert resolve(grid, tmp_path, taught[-1], "teacher") == str(tmp_path / taught[3].name / "x")
    assert resolve(grid, tmp_path, four[-1], "teacher") == ""
    assert resolve(grid, tmp_path, taught[3], "from") == str(tmp_path / taught[1].name)


def test_steps_scale_shortens_every_training(tmp_path):
    chain = made(tmp_path, steps_scale=0.05).chain("four", 1)
    assert [node.settings.get("steps") for node in chain] == [None, 5, None, 2]


def test_shipped_grids_train_at_the_quickstarts_rates_and_their_arms_as_long():
    plan = runpy.run_path(str(REPO / "examples/quickstart/plans.py"))["PERCEPTION"]
    grid = load_grid(REPO / "examples/ablations/strategy.yaml")
    chains = {cell: {node.step: node.settings for node in grid.chain(cell, 1)} for cell in grid.cells}
    staged = chains["moe-in-stage-3"]
    for stage in ("stage1", "stage2", "stage3"):
        assert staged[stage]["set"]["optimizer"]["lr"] == plan[stage]["lr"]
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
        "sixteen_bits",
    } <= cells.keys()
    assert {"fp16", "bf16-params", "bf16-params-stochastic"} <= cells["sixteen_bits"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_end_in_stage_3_and_share_their_start(path):
    grid = load_grid(path)
    assert len(grid.seeds) >= 3
    chains = [grid.chain(cell, 1) for cell in grid.cells]
    ends = {chain[-1].step for chain in chains}
    others = {"knowledge_distilled": {"teacher"}, "preferences": {"preferred"}}
    assert ends == {"stage3"} | others.get(path.stem, set())
    starts = {tuple(node.name for node in chain[:2]) for chain in chains}
    assert len(starts) == {"size": 2, "knowledge": 2, "knowledge_distilled": 2, "knowledge_strategy": 3}.get(
        path.stem, 1
    )
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


# --- results ----------------------------------------------------------------------------------------------------------


# --- curves -----------------------------------------------------------------------------------------------------------
