"""Every layout computes what one process computes: loss, every gradient, every parameter after three updates."""

import os

import pytest

from tests.distributed.layouts import LAYOUTS, MODELS, REFERENCES, SLOW_LAYOUTS, Layout
from tests.distributed.plan import layout_job

# Relative to the largest entry of each tensor, in fp32. Measured worst: gradients 2.6e-6 (norm weights of the tower
# under TP2, whose partial sums are added in another order), losses 2.2e-7, parameters 1.1e-6.
TOLERANCE = 1e-5
# bf16 keeps 8 bits: a sum in another order moves single gradients by a per cent, the loss and the norm by far less.
BF16_LOSS, BF16_GRAD_NORM = 2e-3, 2e-2

# fp16 keeps 11 bits, eight times finer than bf16: a quarter of its tolerances leaves room for what is summed otherwise.
FP16_LOSS, FP16_GRAD_NORM = BF16_LOSS / 4, BF16_GRAD_NORM / 4

# FP8 has three bits: what two layouts round differently (a scale of another share of a tensor, or a value beside the edge
# of a step after the first update) differs visibly. Measured worst: 2.8e-3 and 1.0e-2.
FP8_LOSS, FP8_GRAD_NORM = 1e-2, 3e-2

chosen = SLOW_LAYOUTS if os.environ.get("SLOW_LAYOUTS") else LAYOUTS
fp8 = [layout_job(layout) for layout in chosen if layout.model.startswith("fp8")]
fp32 = [layout_job(layout) for layout in chosen if not layout.model.startswith(("bf16", "fp16", "fp8"))]
fp16 = [layout_job(layout) for layout in chosen if layout.model.startswith("fp16")]
bf16 = [layout_job(layout) for layout in chosen if layout.model.startswith("bf16")]
references = [layout_job(REFERENCES[model]) for model in dict.fromkeys(layout.model for layout in chosen)]


def each(jobs: list[dict]):
    return pytest.mark.parametrize("job", jobs, ids=[job["id"] for job in jobs])


@each(fp32)
def test_layout_equals_one_process(job, result):
    for name in ("loss", "grad_norm", "aux_loss", "z_loss", "gradients", "parameters", "averages", "routing_sums"):
        error, where = result[name]
        assert error <= TOLERANCE, f"{name}: {error:.1e} at {where}"
    assert result["same_routing"], "RoutingStatistics counted other tokens"
    assert result["frozen_moved"] == []
    assert result["copies"] == 0.0, "copies of one shard differ between ranks"


@each(bf16)
def test_bf16_layout_is_close_to_one_process(job, result):
    assert result["loss"][0] <= BF16_LOSS
    assert result["grad_norm"][0] <= BF16_GRAD_NORM
    assert result["copies"] == 0.0


@each(fp16)
def test_fp16_layout_is_close_to_one_process(job, result):
    assert result["loss"][0] <= FP16_LOSS
    assert result["grad_norm"][0] <= FP16_GRAD_NORM
    assert result["copies"] == 0.0


@each(fp8)
def test_fp8_layout_rounds_as_one_process_does(job, result):
    """A pipeline stage and a recomputed layer round the very same numbers; under other axes the blocks are others."""
    if job["layout"].endswith((":pp2", ":recompute-full")):
        assert result["gradients"][0] <= TOLERANCE, result["gradients"]
    assert result["loss"][0] <= FP8_LOSS
    assert result["grad_norm"][0] <= FP8_GRAD_NORM
    assert result["copies"] == 0.0


@each(references)
def test_run_would_show_an_error(job, result):
    """What is compared is there: every trained tensor has a gradient and moves, and only those move."""
    model = MODELS[job["layout"].split(":")[0]]
    moved = {name for name in result["moved"] if not name.endswith("expert_bias")}
    assert set(result["gradients"]) - set(result["zero"]) <= moved <= set(result["gradients"])  # decay moves the rest
    tower = [name for name in result["gradients"] if name.startswith("vision_tower.")]
    assert bool(tower) == (model.roles is not None and "tower" in model.roles)
    image_only = [name for name in result["gradients"] if name.startswith(("vision_tower.", "projector."))]
    assert result["zero"] == (sorted(image_only) if model.rows == "text" else [])


def test_layout_ids_are_unique():
    ids = [layout.id for layout in [*REFERENCES.values(), *LAYOUTS, *SLOW_LAYOUTS]]
    assert len(ids) == len(set(ids))
    assert all(isinstance(layout, Layout) for layout in LAYOUTS)
