"""Plans as text and as JSON."""

import yaml

from megatron_moellava.config import load_config
from megatron_moellava.planning.command import request_of, settings_of
from megatron_moellava.planning.report import (
    COLUMNS,
    dry_run_report,
    json_report,
    plan_row,
    settings_line,
    table,
    text_report,
    yaml_report,
)
from megatron_moellava.planning.search import search
from tests.helpers.planning import arguments, found_for


def test_a_table_has_aligned_columns():
    assert table(("a", "long"), [("first", "1"), ("b", "22")]) == "a      long\nfirst     1\nb        22"


def test_what_the_planner_chose_wins_over_what_was_given():
    (plan, *_) = found_for().plans
    line = settings_line(plan, ["moe.num_moe_experts=4", "training.micro_batch_size=9"])
    assert line.split()[0] == "moe.num_moe_experts=4" and line.count("training.micro_batch_size=") == 1
    assert "micro_batch_size=9" not in line


def test_text_and_json_say_the_same_and_that_nothing_was_measured():
    options = arguments()
    request, given = request_of(options, settings_of(options)), settings_of(options)
    found = search(request)
    best = found.plans[:2]
    text = text_report(request, found, best, given)
    assert "Nothing here was measured on a GPU." in text and all(column in text for column in COLUMNS)
    data = json_report(request, best, given)
    model = data["language_model"]
    assert f"{model['total'] / 1e6:,.1f} M parameters, {model['activated'] / 1e6:,.1f} M activated per token" in text
    assert model["activated"] < model["total"] and f"{model['token_flops'] / 1e9:,.3g} GFLOPs per token" in text
    assert data["predicted"] is True and len(data["plans"]) == 2
    assert data["plans"][0]["command"] in text
    assert data["plans"][0]["memory_bytes"]["total"] == best[0].memory.total
    assert len(plan_row(best[0])) == len(COLUMNS)


def test_a_yaml_file_is_the_run(tmp_path):
    (plan, *_) = found_for().plans
    (tmp_path / "plan.yaml").write_text(yaml_report(plan, None, ["moe.num_moe_experts=4", "optimizer.lr=1e-5"]))
    run = load_config(str(tmp_path / "plan.yaml"), ["model.backbone=phi-2", "training.stage=3"])
    assert run.optimizer.lr == 1e-5 and run.parallel == plan.layout.run.parallel
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["moe"]["num_moe_experts"] == 4


def test_a_dry_run_stands_beside_the_prediction():
    (plan, *_) = found_for().plans
    assert dry_run_report(plan, []) == []
    rows = {"weights": {"counted": 2e6, "predicted": 2.1e6}, "none": {"counted": 0, "predicted": 0}}
    head, rank = dry_run_report(plan, [rows])
    assert "balanced routing" in head and "pipeline rank 0" in rank
    assert "+5.00%" in rank and "+0.00%" in rank
