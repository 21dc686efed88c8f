"""The planner: what it suggests is valid and fits, its sums add up, and its document says what the code says."""

from dataclasses import replace

import pytest

from megatron_moellava.config import ConfigError, load_config
from megatron_moellava.costs.gpus import GPUS
from megatron_moellava.costs.layout import Layout
from megatron_moellava.costs.pipeline_split import stage_layers
from megatron_moellava.planning.command import plan, request_of, settings_of
from megatron_moellava.planning.memory import worst_memory
from megatron_moellava.planning.report import settings_line
from megatron_moellava.planning.search import candidates, imbalance_of, search
from megatron_moellava.validation.run import layout_problems, validate
from tests.helpers import data_files
from tests.helpers.made_tokenizer import write_tokenizer
from tests.helpers.paths import REPO
from tests.helpers.planning import arguments, found_for


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
    data = data_files.make_set(write_tokenizer(tmp_path))
    options = arguments(**given)
    extra = settings_of(options)
    found = search(request_of(options, extra))
    assert found.plans and found.tried > len(found.plans)
    files = [f"data.tokenizer={tmp_path}", f"data.sources=[{{path: {data}, image_folder: {tmp_path}}}]"]
    files += ["data.template=chatml"]
    model = [f"model.backbone={options.backbone}", f"training.stage={options.stage}"]
    for suggestion in found.plans:
        pasted = settings_line(suggestion, extra).split()
        run = load_config(options.config, [*model, *files, *pasted])
        validate(run, options.gpus)
        assert run.parallel == suggestion.layout.run.parallel
        assert suggestion.memory.total <= GPUS["h100"].memory
        interleaved = run.parallel.virtual_pipeline_model_parallel_size
        assert interleaved is None or run.data.packing  # padded rows abort in megatron-core's interleaved pipeline


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


def test_no_more_is_recomputed_than_the_memory_asks_for():
    """On one GPU layouts differ in the recomputation alone; each drops more than the one before, and takes longer."""
    options = arguments(backbone="stablelm-2-1.6b", gpus=1)
    request = request_of(options, settings_of(options))
    layouts = [
        Layout(run=run, backbone=request.backbone, tower=request.tower, world_size=1) for run in candidates(request)
    ]
    assert [layout.run.training.recompute for layout in layouts] == ["none", "moe_act", "moe", "full"]
    needed = [worst_memory(layout, imbalance=request.imbalance).total for layout in layouts]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 4
    found = [search(replace(request, memory_limit=limit)).plans for limit in needed]
    assert [plan.layout for (plan,) in found] == layouts


def test_the_activation_alone_is_not_proposed_where_it_cannot_be_recomputed():
    options = arguments(backbone="stablelm-2-1.6b", gpus=1, overrides=["training.lora.rank=8"])
    request = request_of(options, settings_of(options))
    runs = {run.training.recompute: run for run in candidates(request)}
    refused = {kind for kind, run in runs.items() if layout_problems(run, request.backbone, 1)}
    assert set(runs) == {"none", "moe_act", "moe", "full"} and refused == {"moe_act"}
    layout = Layout(run=runs["moe_act"], backbone=request.backbone, tower=request.tower, world_size=1)
    limit = worst_memory(layout, imbalance=request.imbalance).total
    (suggested,) = search(replace(request, memory_limit=limit)).plans
    assert suggested.layout.run.training.recompute == "moe"


def test_too_little_memory_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"no layout of phi-2 fits 8 h100: the smallest .* needs .* GiB"):
        plan(arguments(memory_limit=4.0, picture=str(tmp_path / "plan.png")))


def test_no_valid_layout_repeats_the_reasons():
    with pytest.raises(ConfigError, match=r"no layout is valid.*\n.*global_batch_size"):
        plan(arguments(gpus=7, overrides=["parallel.pipeline_model_parallel_size=1"]))


# The paper's table 8, in billions: language model with experts in every second layer, without tower and projector.


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


def test_experts_by_modality_make_the_ranks_of_image_experts_the_busiest():
    """Two image and two text experts: a rank has experts of one modality alone, unless there is one rank."""
    groups = ["moe.expert_groups.image=2", "moe.expert_groups.text=2"]
    options = [arguments(gpus=8, overrides=given) for given in ([], groups)]
    plain, grouped = (request_of(asked, settings_of(asked)) for asked in options)
    seen: set[int] = set()
    for layout in (item.layout for item in search(grouped).plans):
        visual = grouped.data.images * layout.tower.num_features
        share = visual / (visual + grouped.data.text_tokens)
        factor = 1.0 if layout.ep == 1 else 2 * max(share, 1 - share)
        seen.add(layout.ep)
        assert imbalance_of(grouped, layout) == pytest.approx(grouped.imbalance * factor)
        assert imbalance_of(plain, replace(layout, run=replace(layout.run, moe=plain.run.moe))) == plain.imbalance
    assert seen >= {1, 2}
