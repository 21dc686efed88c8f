"""Muon under every layout: the updates of one process, and checkpoints that any layout continues."""

import pytest

from tests.distributed.layouts import MUON_CONTINUATIONS, MUON_LAYOUTS
from tests.distributed.plan import continuation_job, layout_job

# As in test_layouts.py. Measured worst: gradients 1.8e-6, parameters after three updates 4.8e-7 (a router under TP2).
TOLERANCE = 1e-5
BF16_LOSS, BF16_GRAD_NORM = 2e-3, 2e-2  # as there

layouts = [layout_job(layout) for layout in MUON_LAYOUTS if not layout.model.endswith("bf16")]
bf16 = [layout_job(layout) for layout in MUON_LAYOUTS if layout.model.endswith("bf16")]
continued = [continuation_job(source, target) for source, target in MUON_CONTINUATIONS]
control = continuation_job("muon:one", "muon:dp2", zero_moments=True)


@pytest.mark.parametrize("job", layouts, ids=[job["id"] for job in layouts])
def test_a_layout_makes_the_updates_of_one_process(job, result):
    assert result["loss"][0] <= TOLERANCE and result["gradients"][0] <= TOLERANCE, result
    assert result["grad_norm"][0] <= TOLERANCE
    assert result["parameters"][0] <= TOLERANCE, result["parameters"]
    assert result["frozen_moved"] == []
    assert result["copies"] == 0.0, "copies of one shard differ between ranks"


@pytest.mark.parametrize("job", bf16, ids=[job["id"] for job in bf16])
def test_in_bf16_it_is_close(job, result):
    assert result["loss"][0] <= BF16_LOSS and result["grad_norm"][0] <= BF16_GRAD_NORM
    assert result["copies"] == 0.0


@pytest.mark.parametrize("job", continued, ids=[job["id"] for job in continued])
def test_a_checkpoint_continues_in_another_layout(job, result):
    assert result["loss"][0] <= TOLERANCE
    assert result["parameters"][0] <= TOLERANCE, result["parameters"]
    assert result["copies"] == 0.0


@pytest.mark.parametrize("job", [control], ids=["zero moments"])
def test_a_lost_momentum_would_be_seen(job, result):
    assert result["parameters"][0] > 100 * TOLERANCE
