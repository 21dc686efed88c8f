"""A checkpoint of any layout continues in any other, and one that does not fit or is damaged is refused by name."""

import pytest

from tests.distributed.layouts import BY_ID, CONTINUATIONS
from tests.distributed.plan import continuation_job, refused_job

TOLERANCE = 1e-5  # as in test_layouts.py: two runs that differ in the order of sums only
each = pytest.mark.parametrize

jobs = [continuation_job(source, target) for source, target in CONTINUATIONS]
controls = [
    continuation_job("llama:one", "llama:dp2", zero_moments=True),
    continuation_job("llama:one", "llama:dp2", skip_weights=True),
]
DENSE, MOE = "llama-dense:one", "llama:one"
into_moe = refused_job("dense into moe", DENSE, MOE)
into_phi = refused_job("llama into phi", MOE, "phi:pp2")
into_wide = refused_job("llama into a wider llama", MOE, MOE, backbone="llama-tiny-wide")
into_other_rope = refused_job("llama with another rope", MOE, MOE, backbone="llama-tiny-rope")
flipped = refused_job("one bit flipped", MOE, "llama:dp2", damage="bit")
lost = refused_job("one file lost", MOE, MOE, damage="file")
intact = refused_job("intact", MOE, "llama:dp2")
retention = {"id": "retention", "run": "run_retention", "layout": "llama-stage1:dp2", "world": 2}
in_background = {"id": "in background", "run": "run_async", "layout": "expert-bias:ep2", "world": 2}


@each("job", jobs, ids=[job["id"] for job in jobs])
def test_checkpoint_continues_in_another_layout(job, result):
    for name in ("loss", "parameters", "averages"):
        error, where = result[name]
        assert error <= TOLERANCE, f"{name}: {error:.1e} at {where}"
    assert result["copies"] == 0.0


@each("job", controls, ids=[job["id"] for job in controls])
def test_lost_state_would_be_seen(job, result):
    assert result["parameters"][0] > 100 * TOLERANCE


@each("job", [into_moe], ids=["moe"])
def test_dense_checkpoint_in_a_moe_model_names_the_tensors(job, result):
    assert "missing: language_model.decoder.layers.0.mlp.experts.experts.linear_fc1.weight" in result["message"]
    assert "not wanted: language_model.decoder.layers.0.mlp.linear_fc1.weight" in result["message"]
    assert "upcycle" in result["message"]


@each("job", [into_wide, into_other_rope, into_moe], ids=["wide", "rope", "moe"])
def test_checkpoint_of_another_model_names_the_fields(job, result):
    expected = {
        "llama into a wider llama": "backbone.hidden_size 128 there, 64 here",
        "llama with another rope": "backbone.rotary_base 10000.0 there, 500000.0 here",  # no tensor would show it
        "dense into moe": "moe.num_moe_experts None there, 4 here",
    }
    assert expected[job["id"]] in result["message"].split("missing:")[0]
    if job is into_other_rope:
        assert "missing: none" in result["message"] and "other shape: none" in result["message"]


@each("job", [into_phi], ids=["phi"])
def test_checkpoint_of_another_family_names_the_tensors(job, result):
    assert "language_model.decoder.layers.0.input_layernorm.bias" in result["message"].split("not wanted")[0]
    assert "language_model.decoder.layers.0.pre_mlp_layernorm.weight" in result["message"].split("not wanted")[1]


@each("job", [into_wide], ids=["wide"])
def test_checkpoint_of_another_size_names_the_shapes(job, result):
    assert "language_model.decoder.final_layernorm.weight (128,) there, (64,) here" in result["message"]


@each("job", [flipped, lost], ids=["bit", "file"])
def test_damaged_checkpoint_is_refused(job, result):
    assert "is damaged" in result["message"] and ".distcp" in result["message"]


@each("job", [intact], ids=["intact"])
def test_intact_copy_is_accepted(job, result):
    assert result["message"] == "no error"


@each("job", [retention], ids=["keep1"])
def test_retention_keeps_the_newest_complete_checkpoint(job, result):
    """A crash between writing run.json and renaming leaves a `.tmp` folder that counts for nothing."""
    assert result["left"] == [["iter_0000006"], ["iter_0000008"]]
    assert result["newest"] == ["iter_0000006", "iter_0000008"]
    assert result["tracker"] == "8"


@each("job", [in_background], ids=["expert-bias ep2"])
def test_save_in_the_background_holds_the_moment_it_was_asked_for(job, result):
    """Two steps are made while it is written, which move buffers in place (expert biases).

    It is no checkpoint until it is complete, and the next one waits for it.
    """
    assert result["early"] == [None, None]
    assert result["names"] == ["iter_0000001"]
    assert result["different"] == []
    assert result["later"] > 0, "a copy made too late would be seen"


def test_sources_save_and_targets_exist():
    assert all(source in BY_ID and target in BY_ID for source, target in CONTINUATIONS)
