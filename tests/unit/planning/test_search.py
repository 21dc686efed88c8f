"""The planner: what it suggests is valid and fits, its sums add up, and its document says what the code says."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, MoEConfig, load_config
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.parameters import parameters_of
from megatron_moellava.costs.pipeline_split import stage_layers
from megatron_moellava.planning import published
from megatron_moellava.planning.activations import activations_of
from megatron_moellava.planning.command import plan, request_of, settings_of
from megatron_moellava.planning.hardware import GIB, GPUS, get_gpu
from megatron_moellava.planning.memory import worst_memory
from megatron_moellava.planning.picture import time_parts
from megatron_moellava.planning.report import settings_line
from megatron_moellava.planning.search import candidates, search, with_settings
from megatron_moellava.towers import get_tower
from megatron_moellava.training.validate import layout_problems, validate
from tests.helpers.paths import REPO

DOCUMENT = REPO / "docs" / "planning.md"


def arguments(**given) -> Namespace:
    values = {
        "backbone": "phi-2",
        "stage": 3,
        "gpus": 8,
        "gpu": "h100",
        "tower": "clip-vit-large-patch14-336",
        "num_experts": None,
        "seq_length": None,
        "global_batch_size": None,
        "samples": None,
        "tokens_per_sample": None,
        "imbalance": 1.25,
        "memory_limit": None,
        "top": 5,
        "picture": "plan.png",
        "json": None,
        "yaml": None,
        "config": None,
        "dry_run": False,
        "overrides": [],
    }
    return Namespace(**values | given)


def found_for(**given):
    options = arguments(**given)
    return search(request_of(options, settings_of(options)))


def layout_of(world_size: int = 8, **settings) -> Layout:
    run = load_config(None, ["model.backbone=phi-2", "training.stage=3", "moe.num_moe_experts=4"])
    run = with_settings(run, {name.replace("__", "."): value for name, value in settings.items()})
    backbone, tower = get_backbone("phi-2"), get_tower(run.model.tower)
    return Layout(run=run, backbone=backbone, tower=tower, world_size=world_size)


@pytest.mark.parametrize(
    "given",
    [
        {"gpus": 16},
        {"backbone": "qwen2-0.5b", "stage": 2},  # 14 heads and 2 query groups: hardly any tensor parallelism
        {"backbone": "vicuna-7b-v1.5", "stage": 2, "overrides": ["data.packing=false"]},
        {"num_experts": 6, "gpus": 6, "global_batch_size": 24, "overrides": ["moe.moe_router_topk=3"]},
        {  # the original's router, padded rows
            "config": str(REPO / "examples" / "recipes" / "stage3.yaml"),
            "overrides": ["training.recompute=full", "parallel.tensor_model_parallel_size=1"],
        },
    ],
    ids=str,
)
def test_every_suggestion_is_accepted_by_the_training_command(given, tmp_path):
    """The pasted settings go the way of tools/train.py: overrides, the whole validation, files included."""
    (tmp_path / "data.json").write_text("[]")
    options = arguments(**given)
    extra = settings_of(options)
    found = search(request_of(options, extra))
    assert found.plans and found.tried > len(found.plans)
    files = [f"data.tokenizer={tmp_path}", f"data.sources=[{{path: {tmp_path}/data.json}}]"]
    model = [f"model.backbone={options.backbone}", f"training.stage={options.stage}"]
    for suggestion in found.plans:
        pasted = settings_line(suggestion, extra).split()
        run = load_config(options.config, [*model, *files, *pasted])
        validate(run, options.gpus)
        assert run.parallel == suggestion.layout.run.parallel
        assert suggestion.memory.total <= GPUS["h100"].memory


def test_layouts_that_validation_refuses_are_tried_and_never_suggested():
    options = arguments(backbone="qwen2-0.5b", stage=2, gpus=8)
    request = request_of(options, [])
    refused = [
        run.parallel for run in candidates(request) if layout_problems(run, request.backbone, request.world_size)
    ]
    assert any(parallel.tensor_model_parallel_size == 4 for parallel in refused)
    suggested = [item.layout.run.parallel for item in search(request).plans]
    assert suggested and not any(parallel in refused for parallel in suggested)
    assert {parallel.tensor_model_parallel_size for parallel in suggested} == {1, 2}


def test_what_the_user_sets_stays():
    found = found_for(overrides=["parallel.expert_model_parallel_size=4", "training.recompute=full"])
    assert {item.layout.ep for item in found.plans} == {4}
    assert {item.layout.run.training.recompute for item in found.plans} == {"full"}


def test_too_little_memory_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"no layout of phi-2 fits 8 h100: the smallest .* needs .* GiB"):
        plan(arguments(memory_limit=4.0, picture=str(tmp_path / "plan.png")))


def test_no_valid_layout_repeats_the_reasons():
    with pytest.raises(ConfigError, match=r"no layout is valid.*\n.*global_batch_size"):
        plan(arguments(gpus=7, overrides=["parallel.pipeline_model_parallel_size=1"]))


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="h100"):
        get_gpu("h10")


def test_seconds_of_a_step_add_up():
    for item in found_for(gpus=16, overrides=["training.recompute=none"]).plans[:20]:
        assert sum(time_parts(item).values()) == pytest.approx(item.costs.step_seconds)
        assert 0 < item.costs.mfu < 0.72, "no more than the best kernels reach"
        assert item.costs.gpu_hours == pytest.approx(item.costs.hours * 16)


def test_recomputation_and_parallelism_save_memory():
    plain = worst_memory(layout_of())
    full = worst_memory(layout_of(training__recompute="full"))
    moe = worst_memory(layout_of(training__recompute="moe"))
    assert full.activations < moe.activations < plain.activations
    split = worst_memory(layout_of(parallel__expert_model_parallel_size=4))
    assert split.weights < plain.weights and split.gradients < plain.gradients
    assert split.optimizer == pytest.approx(plain.optimizer), "a share of as many experts, among fewer ranks"
    tensor = worst_memory(layout_of(parallel__tensor_model_parallel_size=2))
    assert tensor.activations < 0.55 * plain.activations


def test_frozen_parameters_need_neither_gradient_nor_optimizer():
    whole = layout_of()
    dense = replace(whole, run=replace(whole.run, moe=None, training=replace(whole.run.training, stage=1)))
    memory = worst_memory(dense)
    assert memory.gradients == pytest.approx(4 * 9_180_160)
    assert memory.optimizer == pytest.approx(12 * 9_180_160 / 8)
    assert memory.weights > 5e9


def test_first_stages_keep_more_micro_batches():
    four = layout_of(parallel__pipeline_model_parallel_size=4, training__global_batch_size=64)
    assert [max(four.in_flight(rank)) for rank in range(4)] == [(4,), (3,), (2,), (1,)]
    few = layout_of(parallel__pipeline_model_parallel_size=4, training__global_batch_size=4)
    assert [max(few.in_flight(rank)) for rank in range(4)] == [(2,), (2,), (2,), (1,)]
    virtual = {"parallel__pipeline_model_parallel_size": 2, "parallel__virtual_pipeline_model_parallel_size": 2}
    interleaved = layout_of(**virtual)
    assert interleaved.layers_of(0) == [list(range(8)), list(range(16, 24))]
    # Megatron-Core's warm-up of the first rank: 2 micro-batches on each chunk, then a third on the first.
    assert {(1, 0), (2, 0), (2, 1), (2, 2), (3, 2)} <= interleaved.in_flight(0)
    assert max(map(sum, interleaved.in_flight(0))) == 5 and max(map(sum, interleaved.in_flight(1))) == 3


def test_an_imbalance_costs_memory_and_time():
    even, skewed = (found_for(imbalance=factor, gpus=4).plans[0] for factor in (1.0, 2.0))
    assert skewed.memory.margin > even.memory.margin
    assert skewed.costs.step_seconds > even.costs.step_seconds


def test_gpu_modules_keep_less_than_local_ones():
    layout = layout_of()
    local, fused = (activations_of(layout, 0, name).total for name in ("local", "te"))
    assert 0.5 * local < fused < local


def test_document_has_the_table_that_the_code_computes():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert published.markdown_table() in text, "run python -m megatron_moellava.planning.published"


def test_published_language_models_are_met_within_a_sixth():
    checks = {item.run.name: item for item in published.check_all() if item.run.unit == "mfu"}
    assert abs(checks["Mixtral 8x7B"].off) < 0.01, "the constants were fitted to this run"
    others = [item for item in checks.values() if not item.run.calibrates]
    assert len(others) == 3 and all(abs(item.off) < 1 / 6 for item in others)
    for item in checks.values():
        assert item.memory < GPUS["h100"].memory, f"{item.run.name} ran on 80 GB"


def test_published_layouts_count_the_published_parameters():
    """Active and total parameters of the models whose runs are checked, in billions."""
    for run, total in ((published.RUNS[0], 46.7), (published.RUNS[1], 140.6), (published.RUNS[3], 57.4)):
        alone = replace(run, gpus=1, parallel=type(run.parallel)(), global_batch_size=1).layout
        count = parameters_of(alone, 0)
        language = sum(number for part, number in count.items() if part not in ("tower", "projector"))
        assert language / 1e9 == pytest.approx(total, rel=0.005)


# The paper's table 8, in billions: language model with experts in every second layer, without tower and projector.
@pytest.mark.parametrize(("name", "total"), [("stablelm-2-1.6b", 2.9), ("qwen-1.8b", 3.1), ("phi-2", 5.3)])
def test_models_of_the_paper_have_its_number_of_parameters(name, total):
    run = load_config(None, [f"model.backbone={name}", "training.stage=3", "moe.num_moe_experts=4"])
    layout = Layout(run=run, backbone=get_backbone(name), tower=get_tower(run.model.tower), world_size=1)
    language = sum(n for part, n in parameters_of(layout, 0).items() if part not in ("tower", "projector"))
    assert round(language / 1e9, 1) == total


def test_yaml_holds_the_whole_suggestion(tmp_path):
    """The file is a config of tools/train.py: the recipe's fields, what was asked for, what the planner chose."""
    recipe, file = str(REPO / "examples" / "recipes" / "stage3.yaml"), tmp_path / "plan.yaml"
    options = arguments(
        config=recipe,
        yaml=str(file),
        picture=str(tmp_path / "plan.png"),
        overrides=["optimizer.lr=1e-5", "training.micro_batch_size=4"],
        top=1,
    )
    text = plan(options)
    run = load_config(str(file), ["model.backbone=phi-2", "training.stage=3"])
    assert run.moe.moe_expert_capacity_factor == 1.5 and run.optimizer.lr == 1e-5
    assert f"training.micro_batch_size={run.training.micro_batch_size}" in text
    assert layout_problems(run, get_backbone("phi-2"), 8) == []


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> tuple[str, dict, Path, int]:
    """(text, JSON, picture, peak bytes) of the command on full-size phi-2 with a dry run of two pipeline stages."""
    folder = tmp_path_factory.mktemp("plan")
    command = [sys.executable, "tools/plan.py", "--backbone", "phi-2", "--stage", "3", "--gpus", "8", "--dry-run"]
    command += ["--picture", str(folder / "plan.png"), "--json", str(folder / "plan.json")]
    command += [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.expert_model_parallel_size=4",
        "moe.num_moe_experts=8",
    ]
    with (folder / "out").open("w") as out, (folder / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=REPO)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "errors").read_text()[-3000:]
    data = json.loads((folder / "plan.json").read_text())
    return (folder / "out").read_text(), data, folder / "plan.png", usage.ru_maxrss * 1024


def test_command_writes_report_picture_and_json(planned):
    text, data, picture, _ = planned
    assert "Predictions for phi-2" in text and "Nothing here was measured on a GPU" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["predicted"] is True
    best = data["plans"][0]
    assert best["settings"]["parallel.pipeline_model_parallel_size"] == 2
    assert "moe.num_moe_experts=8" in best["command"] and best["command"] in text
    assert best["memory_bytes"]["total"] < 80 * GIB


def test_dry_run_counts_what_the_formulas_say(planned):
    _, data, _, peak = planned
    assert len(data["dry_run"]) == 2
    for rows in data["dry_run"]:
        for kind in ("num_parameters", "forward_flops", "backward_flops"):
            assert rows[kind]["predicted"] == rows[kind]["counted"], kind
        for kind in ("weights", "gradients", "optimizer", "activations"):  # padded buckets, masks and indices
            assert rows[kind]["predicted"] == pytest.approx(rows[kind]["counted"], rel=2e-3), kind
    held = sum(rows[kind]["counted"] for rows in data["dry_run"] for kind in ("weights", "gradients", "activations"))
    assert held > 29e9
    assert peak < 2e9, "a full-size model must not take real memory"


def test_moe_is_assumed_in_stage_3_only_and_is_pasted():
    assert request_of(arguments(), settings_of(arguments())).run.moe == MoEConfig()
    assert settings_of(arguments()) == ["moe.num_moe_experts=4"]
    assert request_of(arguments(stage=2), settings_of(arguments(stage=2))).run.moe is None


def test_context_parallelism_is_refused_rather_than_guessed():
    with pytest.raises(ConfigError, match="context_parallel_size=2 cannot be planned"):
        request_of(arguments(), ["moe.num_moe_experts=4", "parallel.context_parallel_size=2"])


def test_pipeline_stages_level_in_cost_are_tried_and_win_where_the_tower_weighs():
    """One stage less one layer beside the tower: the planner knows the split that the model will be built with."""
    given = {
        "overrides": ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=null"]
    }
    found = found_for(backbone="stablelm-2-1.6b", gpus=16, **given)
    splits = {item.layout.run.parallel.pipeline_split: item for item in reversed(found.plans)}
    assert set(splits) == {"even", "cost"}
    level = splits["cost"]
    assert level.settings["parallel.pipeline_split"] == "cost"
    assert level.layout.stage_sizes == tuple(stage_layers(level.layout.run, level.layout.backbone))
    assert level.layout.stage_sizes[0] < level.layout.backbone.num_layers // 4
    assert level.costs.step_seconds < splits["even"].costs.step_seconds
