"""A step whose gradient is not finite changes nothing on any rank; several in a row end the run and name the samples."""

import pytest

from tests.distributed.layouts import BY_ID

LAYOUTS = (
    "llama-stage3:one",
    "llama-stage3:ep2",
    "llama-stage3:pp2-vpp2",
    "llama-stage1:tp2",
    "llama-stage1:pp2",
    "llama:ep2-overlap",
    "expert-bias:ep2",
    "expert-bias:tp2",
    "expert-bias:cp2",
    "fp8-delayed:pp2",
    "fp16:ep2",
)
jobs = [
    {"id": f"not finite {layout}", "run": "run_not_finite", "layout": layout, "world": BY_ID[layout].world}
    for layout in LAYOUTS
]


@pytest.mark.parametrize("job", jobs, ids=LAYOUTS)
def test_step_without_finite_gradient_is_skipped_and_counted(job, result):
    assert (result["first_applied"], result["skipped"], result["updates"]) == (False, 1.0, 0)
    assert result["moved"] == []
    assert (result["schedule"], result["same_histories"]) == (0, True)
    assert (result["second_applied"], result["updates_after"], result["finite"]) == (True, 1, True)


@pytest.mark.parametrize("job", jobs, ids=LAYOUTS)
def test_run_stops_after_patience_and_names_the_samples_of_the_ranks_that_began(job, result):
    assert result["exit"] == 3
    assert result["iteration"] == 4  # poisoned, good, poisoned, poisoned
    assert "2 steps in a row" in result["message"]
    # Only images are poisoned. With two data-parallel ranks the odd micro-batches belong to one that never sees any.
    guilty = (0, 2) if ":ep2" in job["layout"] else (0, 1, 2, 3)
    for micro_batch in range(4):
        assert (f"3{micro_batch}.0" in result["message"]) == (micro_batch in guilty)
