"""Numbers of a run's logs: losses, spikes, time, load."""

import json

import pytest

from megatron_moellava.experiments.curves import curve_numbers, loss_spikes, sample_length


def test_a_spike_counts_once_however_long_it_lasts():
    calm = [1.0] * 40
    assert loss_spikes(calm) == 0
    assert loss_spikes([*calm, 3.0, 3.0, 2.5, *calm[:30]]) == 1
    assert loss_spikes([*calm, 3.0, *calm[:5], float("nan"), *calm[:5]]) == 2
    assert loss_spikes([0.01] * 40 + [0.05]) == 0  # five times as much, and nothing
    assert loss_spikes([8.0, 3.0, 9.0, *calm]) == 0  # the first steps have nothing to be compared with


def test_numbers_of_a_run_come_from_its_logs(tmp_path):
    steps = [
        {"iteration": i, "loss": 2.0 - i / 100, "grad_norm": 1.0, "skipped": float(i == 0), "step_seconds": 6.0}
        for i in range(100)
    ]
    steps[0]["loss"] = float("nan")
    layer = {"layer": 0, "choices": [900, 100, 0, 0], "dropped": [0, 0, 0, 0], "max_load": 3.6, "entropy": 0.3}
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "routing.jsonl").write_text(json.dumps({"iteration": 50, "layers": [layer]}) + "\n")
    numbers = curve_numbers(tmp_path)
    assert numbers["final_loss"] == pytest.approx(1.055)  # of the last ten
    assert numbers["peak_loss"] == 1.99  # the loss of the skipped step is no number
    assert (numbers["skipped_steps"], numbers["train_minutes"], numbers["max_load"]) == (1, 10.0, 3.6)
    assert numbers["dead_experts"] == 2


def test_a_samples_length_counts_real_tokens_of_all_steps():
    steps = [
        {"samples": 4, "tokens_per_second": 100.0, "step_seconds": 2.0},
        {"samples": 6, "tokens_per_second": 50.0, "step_seconds": 6.0},
    ]
    assert sample_length(steps) == 50.0
    assert sample_length([]) == 0.0
