"""A full-size model on fake tensors counts what the formulas say."""

import pytest

from megatron_moellava.backbones import get_backbone
from megatron_moellava.config import load_config
from megatron_moellava.costs.layout import Layout
from megatron_moellava.data.batch import Counts
from megatron_moellava.planning.command import predicted_counts
from megatron_moellava.planning.dry_run import count_rank
from megatron_moellava.planning.search import with_settings
from megatron_moellava.towers import get_tower, tower_of_run
from megatron_moellava.training.throughput import Throughput


def test_dry_run_counts_what_the_formulas_say(planned):
    _, data, _, peak = planned
    assert len(data["dry_run"]) == 2
    for rows in data["dry_run"]:
        for kind in ("num_parameters", "forward_flops", "backward_flops"):
            assert rows[kind]["predicted"] == rows[kind]["counted"], kind
        for kind in ("weights", "gradients", "optimizer", "activations"):  # padded buckets, masks and indices
            assert rows[kind]["predicted"] == pytest.approx(rows[kind]["counted"], rel=2e-3), kind
    held = sum(rows[kind]["counted"] for rows in data["dry_run"] for kind in ("weights", "gradients", "activations"))
    assert held > 26e9
    assert peak < 2e9, "a full-size model must not take real memory"


# Counted over logged FLOPs: a counter takes scores above the diagonal and those that a flash kernel's backward pass makes
# again as work; at full size that is little. Measured: 1.065.
COUNTED_OVER_LOGGED = 1.08


def test_dry_run_counts_little_more_than_a_training_log(planned):
    """The FLOPs that the log of a run would give for the very micro-batch of the dry run."""
    _, data, _, _ = planned
    settings = data["plans"][0]["settings"]
    assert settings["training.recompute"] == "none", "a log counts nothing twice"
    run = load_config(None, ["model.backbone=phi-2", "training.stage=3", "moe.num_moe_experts=8"])
    run = with_settings(run, settings)
    backbone, tower = get_backbone("phi-2"), get_tower(run.model.tower)
    layout = Layout(run=run, backbone=backbone, tower=tower, world_size=8)
    rows, length = run.training.micro_batch_size, run.data.seq_length
    counts = Counts(
        samples=rows,
        loss_tokens=layout.tokens,
        real_tokens=layout.tokens,
        positions=layout.tokens,
        image_rows=layout.images * tower.num_features,
        tower_inputs=layout.images,
        squared_lengths=rows * length**2,
        attended=rows * length**2,
    )
    logged = Throughput(run, backbone, tower, world_size=8).flops(counts)
    counted = sum(stage[kind]["counted"] for stage in data["dry_run"] for kind in ("forward_flops", "backward_flops"))
    assert 1.0 < counted / logged < COUNTED_OVER_LOGGED


@pytest.mark.parametrize("tower", ["siglip2-base-patch16-naflex", "siglip2-base-patch16-naflex@pixel_shuffle"])
def test_pictures_at_native_resolution_are_counted_as_the_formulas_say(tower):
    settings = ["model.backbone=llama-tiny", f"model.tower={tower}", "training.stage=2", "data.seq_length=512"]
    run = load_config(None, [*settings, "data.max_image_tokens=60"])
    layout = Layout(run=run, backbone=get_backbone("llama-tiny"), tower=tower_of_run(run), world_size=1)
    counted, predicted = count_rank(layout, 0), predicted_counts(layout, 0)
    for kind in ("num_parameters", "forward_flops", "backward_flops"):
        assert getattr(counted, kind) == predicted[kind], kind
    assert predicted["activations"] == pytest.approx(counted.activations, rel=0.02)


@pytest.mark.parametrize("frames, pooling", [(6, "2x2x2"), (5, "2x2")])
def test_pooled_videos_are_counted_as_the_formulas_say(frames, pooling):
    settings = [
        "model.backbone=llama-tiny",
        "model.tower=siglip-base-patch16-224",
        "training.stage=2",
        "data.seq_length=512",
    ]
    run = load_config(None, [*settings, f"data.video_frames={frames}", f"data.video_pooling={pooling}"])
    layout = Layout(run=run, backbone=get_backbone("llama-tiny"), tower=tower_of_run(run), world_size=1)
    assert layout.images >= frames
    counted, predicted = count_rank(layout, 0), predicted_counts(layout, 0)
    for kind in ("num_parameters", "forward_flops", "backward_flops"):
        assert getattr(counted, kind) == predicted[kind], kind
    assert predicted["activations"] == pytest.approx(counted.activations, rel=0.02)


def test_a_tower_for_videos_is_counted_as_the_formulas_say():
    settings = ["model.backbone=llama-tiny", "model.tower=languagebind-video-tiny", "training.stage=2"]
    run = load_config(None, [*settings, "data.seq_length=128", "data.video_frames=4"])
    layout = Layout(run=run, backbone=get_backbone("llama-tiny"), tower=tower_of_run(run), world_size=1)
    assert layout.images == 16, "four videos of four frames"
    for trained, missing in (
        ("[projector]", 0.01),
        ("[tower, projector]", 0.05),
    ):  # as of other towers that are trained
        run = load_config(None, [*settings, "data.seq_length=128", "data.video_frames=4", f"training.trains={trained}"])
        layout = Layout(run=run, backbone=get_backbone("llama-tiny"), tower=tower_of_run(run), world_size=1)
        counted, predicted = count_rank(layout, 0), predicted_counts(layout, 0)
        for kind in ("num_parameters", "forward_flops", "backward_flops"):
            assert getattr(counted, kind) == predicted[kind], kind
        assert predicted["activations"] == pytest.approx(counted.activations, rel=missing)


# Of activations 3.1 % are missing where towers are trained: what their first layers keep is in no formula.
@pytest.mark.parametrize(
    "fields, trains, missing",
    [
        ("tower: siglip-tiny, projector: own", "[tower, projector, language.ffn]", 0.035),
        ("projector: own", "[projector]", 0.02),
        ("tower: clip-tiny", "[projector]", 0.02),
    ],
)
def test_modalities_with_towers_of_their_own_are_counted_as_the_formulas_say(fields, trains, missing):
    settings = ["model.backbone=llama-tiny", "model.tower=clip-tiny", "training.stage=2", "data.seq_length=512"]
    records = f"[{{name: depth, levels: uint16, {fields}}}, {{name: thermal, levels: float, projector: own}}]"
    run = load_config(None, [*settings, f"data.modalities={records}", f"training.trains={trains}"])
    layout = Layout(run=run, backbone=get_backbone("llama-tiny"), tower=tower_of_run(run), world_size=1)
    assert layout.images == 512 // (36 + 36 + (16 if "siglip" in fields else 36) + 16), (
        "a sample has one picture of each"
    )
    counted, predicted = count_rank(layout, 0), predicted_counts(layout, 0)
    for kind in ("num_parameters", "forward_flops", "backward_flops"):
        assert getattr(counted, kind) == predicted[kind], kind
    assert predicted["activations"] == pytest.approx(counted.activations, rel=missing)


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_of_tower_and_projector_are_counted_as_the_formulas_say(ranks):
    settings = ["model.backbone=llama-tiny", "model.tower=siglip-base-patch16-224", "training.stage=2"]
    settings += ["data.seq_length=512", "training.trains=[tower,projector]", "tower_moe.placement=[0,3]"]
    settings += ["projector_moe.num_moe_experts=8"]  # 196 tokens of a rank, twice, are as many for each
    settings += [f"parallel.{kind}_model_parallel_size={ranks}" for kind in ("tensor", "expert")]
    run = load_config(None, settings)
    layout = Layout(run=run, backbone=get_backbone("llama-tiny"), tower=tower_of_run(run), world_size=ranks)
    counted, predicted = count_rank(layout, 0), predicted_counts(layout, 0)
    for kind in ("num_parameters", "forward_flops", "backward_flops"):
        assert getattr(counted, kind) == predicted[kind], kind
    assert predicted["weights"] == pytest.approx(counted.weights, rel=2e-3)
    assert predicted["activations"] == pytest.approx(counted.activations, rel=0.1)
