"""A full-size model on fake tensors counts what the formulas say."""

import pytest


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
