"""The planner's command: report, picture, JSON and YAML."""

from dataclasses import replace

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import ConfigError, MoEConfig, load_config
from megatron_moellava.costs.gpus import GIB
from megatron_moellava.planning.command import plan, request_of, settings_of
from megatron_moellava.validation.run import layout_problems
from tests.helpers.paths import REPO
from tests.helpers.planning import arguments


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


def test_command_writes_report_picture_and_json(planned):
    text, data, picture, _ = planned
    assert "Predictions for phi-2" in text and "Nothing here was measured on a GPU" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data["predicted"] is True
    best = data["plans"][0]
    assert best["settings"]["parallel.pipeline_model_parallel_size"] == 2
    assert "moe.num_moe_experts=8" in best["command"] and best["command"] in text
    assert best["memory_bytes"]["total"] < 80 * GIB


def test_moe_is_assumed_in_stage_3_only_and_is_pasted():
    assert request_of(arguments(), settings_of(arguments())).run.moe == MoEConfig()
    assert settings_of(arguments()) == ["moe.num_moe_experts=4"]
    assert request_of(arguments(stage=2), settings_of(arguments(stage=2))).run.moe is None


@pytest.mark.parametrize("stage", [1, 3])
def test_a_backbone_with_experts_of_its_own_is_planned_with_them(stage):
    """As `moellava train` takes them over, so that nothing of them is pasted; what is asked for beside them is kept."""
    given = arguments(backbone="olmoe-1b-7b-0924", stage=stage, overrides=["moe.moe_aux_loss_coeff=0.5"])
    request = request_of(given, settings_of(given))
    assert request.run.moe == replace(request.backbone.moe, moe_aux_loss_coeff=0.5)
    assert settings_of(given) == ["moe.moe_aux_loss_coeff=0.5"]
    assert layout_problems(request.run, request.backbone, 1) == []


def test_context_parallelism_is_refused_rather_than_guessed():
    with pytest.raises(ConfigError, match="context_parallel_size=2 cannot be planned"):
        request_of(arguments(), ["moe.num_moe_experts=4", "parallel.context_parallel_size=2"])


def test_videos_take_the_place_of_pictures_and_are_shown_as_the_data_settings_say():
    given = ["data.video_pooling=2x2x2", "data.video_fps=1", "data.video_frames=32"]
    options = arguments(stage=2, videos=0.25, video_seconds=20.0, top=1, overrides=given)
    request = request_of(options, settings_of(options))
    assert (request.data.images, request.data.videos) == (0.95 - 0.25, 0.25)
    shown = request.data.shown(request.tower, request.run.data)
    assert shown.tokens == pytest.approx(0.7 * 576 + 0.25 * 10 * 144) and shown.images == pytest.approx(0.7 + 0.25 * 20)
    named = request_of(arguments(images=2.0, image_size=(64, 48)), [])
    assert named.data.images == 2 and named.data.image_size == (64, 48)


def test_settings_that_a_tower_cannot_have_are_refused_as_in_training():
    options = arguments(stage=2, tower="siglip2-base-patch16-naflex", overrides=["data.video_pooling=2x2"])
    with pytest.raises(ConfigError, match="averages squares of visual tokens"):
        request_of(options, settings_of(options))


def test_tokens_per_sample_are_text_and_pictures_of_their_budget():
    options = arguments(tokens_per_sample=400.0, tower="siglip2-base-patch16-naflex@pixel_shuffle")
    given = ["data.max_image_tokens=100"]
    request = request_of(options, [*settings_of(options), *given])
    assert request.tower.num_features == 100
    assert request.data.shown(request.tower, request.run.data).tokens + request.data.text_tokens == pytest.approx(400)
