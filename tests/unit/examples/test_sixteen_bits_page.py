"""The page "sixteen bits" is made of the data beside it, and of nothing else."""

import json
import math

import pytest

PROGRAM, GRID = "sixteen_bits_page", "sixteen_bits"


def record(iteration: int, **more: float) -> dict:
    layer = {"attention": 1.0, "mlp": 2.0, "hidden": 3.0} | {"router_logits": 4.0}
    layer |= {"attention_gradient": 0.1, "mlp_gradient": 0.01, "hidden_gradient": 0.01} | more
    return {"iteration": iteration, "layers": [{"layer": 0} | layer, {"layer": 1} | layer]}


def row(program, cell: str, seed: int, bits: float, *records: dict) -> dict:
    counts = {"loss_spikes": seed, "skipped_steps": 0, "diverged": 0.0}
    numbers = {"before": 25.0, "final_loss": 1.0, "peak_loss": 2.0, "steps": 4, "curve": [2.0, 1.0], **counts}
    return {
        "cell": cell,
        "seed": seed,
        "bits_per_fact": bits,
        **numbers,
        **program.traces(list(records or [record(2)])),
    }


def test_the_page_is_what_the_data_give(program, grid, rows, written):
    assert rows and written == program.page(grid, rows)
    assert {row["cell"] for row in rows} <= set(grid.cells) and len(json.dumps(rows)) < 200_000
    assert all(row["steps"] == 1000 and row["bits_per_fact"] > 0 for row in rows if not row["diverged"])


def test_what_is_finished_is_taken_with_its_largest_activations(program, grid, tmp_path):
    folder = tmp_path / grid.chain("fp16", 2)[-1].name
    before = tmp_path / next(node.name for node in grid.chain("fp16", 2) if node.step == "stage2")
    for path in (folder, before):
        path.mkdir()
    (before / "done.json").write_text(json.dumps({"numbers": {"bits_per_fact": 12.0}}))
    numbers = {"bits_per_fact": 9.0, "final_loss": 1.0, "skipped_steps": 3, "steps": 2, "router_entropy": 0.5}
    (folder / "done.json").write_text(json.dumps({"numbers": numbers}))
    (folder / "steps.jsonl").write_text('{"iteration": 1, "loss": 2.000049}\n{"iteration": 2, "loss": 1.0}\n')
    records = [record(1, hidden=1234.4) | {"loss_scale": 8.0}, record(2, hidden=math.inf) | {"loss_scale": 4.0}]
    (folder / "activations.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))
    (found,) = program.gather(tmp_path, grid)
    assert (found["cell"], found["seed"], found["skipped_steps"]) == ("fp16", 2, 3) and "router_entropy" not in found
    assert (
        found["before"] == 12.0
        and found["curve"] == [2.0, 1.0]
        and found["loss_scales"] == [8.0, 4.0]
        and found["iterations"] == [1, 2]
    )
    assert found["largest"]["hidden"] == [[1234.0, None], [1234.0, None]]
    assert found["largest"]["router_logits"] == [[4.0, 4.0], [4.0, 4.0]]
    json.dumps(found, allow_nan=False)


def test_the_largest_of_a_run_is_over_layers_and_steps_and_a_scale_is_that_of_its_step(program):
    records = [record(1, attention_gradient=0.5) | {"loss_scale": 8.0}, record(2) | {"loss_scale": 64.0}]
    run = row(program, "fp16", 1, 9.0, *records)
    assert program.top(run, program.GRADIENTS) == 0.5
    assert program.top(run, program.GRADIENTS, scaled=True) == pytest.approx(6.4)
    broken = row(program, "fp16", 1, 9.0, record(1, mlp=5.0), record(2, hidden=math.inf, mlp=9.0), record(3, mlp=8.0))
    assert program.top(broken, program.ACTIVATIONS) == 5.0


def test_where_a_run_breaks_is_its_first_value_that_is_not_finite(program, grid):
    broken = record(4, hidden=math.inf, mlp_gradient=math.inf)
    broken["layers"][0] |= {"hidden": 3.0}
    run = row(program, "fp16", 1, 9.0, record(2), broken, record(6, attention=math.nan))
    assert program.first_break(run) == (1, "step 4: hidden of layer 2")
    vanished = row(program, "fp16", 1, 9.0, record(2), record(4, mlp_gradient=math.inf))
    assert program.first_break(vanished) == (1, "step 4: mlp_gradient of layer 1")
    assert program.first_break(row(program, "fp16", 1, 9.0)) == (1, "")
    scaled = row(program, "fp16", 2, 9.0, record(2, hidden=1234.4) | {"loss_scale": 8.0})
    table = program.room_table(grid, [scaled])
    assert "| fp16 | 1,230 | 53.1 | 4 | 0.1 | 0.8 | 8 |  |" in table
    assert "| fp16 | 3 | 21,800 | 4 | 0.1 |  |  | step 4: hidden of layer 2 |" in program.room_table(grid, [run])


def test_a_run_that_diverged_has_a_line_without_bits(program, grid):
    run = row(program, "fp16-wild", 1, 9.0) | {"diverged": 1.0, "bits_per_fact": None, "final_loss": None}
    rows = [run, row(program, "bf16-wild", 1, 9.0)]
    table = program.arms_table(grid, rows)
    assert "bf16-router" in program.not_run(grid, rows) and "wild," not in program.not_run(grid, rows)
    assert "| fp16-wild | 1 | 25.00 |  | bf16-wild |  |  |  |  | 2.0000 | 1.0 | 0.0 | 1 |" in table


def test_all_comparisons_of_the_page_are_corrected_together(program, grid):
    shifts = {"bf16": 0.0, "fp32": 1.0, "fp16": 2.0, "fp16-warmup": -3.0, "gentle-bf16": 0.0}
    rows = [
        row(program, cell, seed, 20 + seed + shift * (1 + seed / 9))
        for cell, shift in shifts.items()
        for seed in (1, 2, 3)
    ]
    found = program.comparisons(grid, rows)
    assert set(found) >= {("fp32", "bf16"), ("fp16", "bf16"), ("fp16-warmup", "bf16")}
    assert all(other in shifts for _, other in found) and not any(cell == other for cell, other in found)
    smallest = min(item.p for item, _ in found.values())
    assert min(corrected for _, corrected in found.values()) == pytest.approx(smallest * len(found))
    table = program.arms_table(grid, rows)
    assert (
        "| **bf16** | 3 | 25.00 ± 0.00 | 22.00 ± 1.00 |  |" in table
        and "| fp32 | 3 | 25.00 ± 0.00 | 23.22 ± 1.11 | bf16 | +1.22 ± 0.11 |" in table
    )


def test_what_the_page_says_is_true_of_the_data(program, rows):
    of = {name: [row for row in rows if row["cell"] == name] for name in {row["cell"] for row in rows}}
    for run in (*of["fp16-wild"], *of["fp16-wild-clipping"]):
        count, place = program.first_break(run)
        assert run["diverged"] and run["iterations"][count] <= 20 and ("mlp of" in place or "hidden of" in place)
        assert run["loss_scales"][-1] == 1.0 and program.top(run, program.LOGITS) < 100
        before_experts = max(run["largest"]["attention_gradient"][0][:count])
        assert before_experts == program.top(run, program.GRADIENTS)
        assert program.top(run, program.GRADIENTS, scaled=True) < program.LARGEST_FP16
        stream, gradients = run["largest"]["hidden"][0][:count], run["largest"]["hidden_gradient"][0][:count]
        assert stream[-1] > 20 * stream[0] and gradients[-1] < gradients[0] / 20
    assert {row["seed"] for row in of["fp16-wild"]} == {1, 2, 3}
    for run in of["bf16-wild"]:
        assert not run["diverged"] and program.top(run, program.ACTIVATIONS) > 10 * program.LARGEST_FP16
        assert run["bits_per_fact"] > run["before"]
    for run in of["fp16"]:
        assert not run["diverged"] and run["skipped_steps"] <= 5 and run["loss_scales"][-1] >= run["loss_scales"][0] / 2
        assert 5 < program.LARGEST_FP16 / program.top(run, program.ACTIVATIONS) < 10
    stressed = {name: {row["seed"]: row for row in of[name]} for name in ("fp16", "fp16-z-loss", "gentle-fp16")}
    for seed, run in stressed["fp16-z-loss"].items():
        assert 5 < run["bits_per_fact"] - stressed["fp16"][seed]["bits_per_fact"] < 9
        assert run["bits_per_fact"] > run["before"]
        assert program.top(run, program.LOGITS) < program.top(stressed["fp16"][seed], program.LOGITS)
    plain, nearest, chance = (
        {row["seed"]: row for row in of[f"gentle-bf16{end}"]} for end in ("", "-params", "-params-stochastic")
    )
    assert 1 in plain and 1 in nearest and 1 in chance
    for seed in plain.keys() & nearest.keys():
        before, best = plain[seed]["before"], plain[seed]["bits_per_fact"]
        assert before - nearest[seed]["bits_per_fact"] < (before - best) / 2
        for points in (program.ACTIVATIONS, program.GRADIENTS):
            assert 0.5 < program.top(nearest[seed], points) / program.top(plain[seed], points) < 2
    assert plain.keys() == stressed["gentle-fp16"].keys() == {1, 2, 3}
    for seed, run in stressed["gentle-fp16"].items():
        assert abs(run["bits_per_fact"] - plain[seed]["bits_per_fact"]) < 0.05
    for seed in plain.keys() & chance.keys():
        assert abs(chance[seed]["bits_per_fact"] - plain[seed]["bits_per_fact"]) < 0.1


def test_the_picture_has_a_column_for_each_telling_arm_that_has_run(program, grid, tmp_path):
    records = [record(1) | {"loss_scale": 8.0}, record(2, hidden=math.inf) | {"loss_scale": 4.0}]
    rows = [row(program, cell, seed, 9.0, *records) for cell in ("bf16", "fp16") for seed in (1, 2)]
    program.draw(grid, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
