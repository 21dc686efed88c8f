"""Each layer's largest activation and gradient, in the log of the steps that ask for it."""

import json

import pytest
import torch

from megatron_moellava.training.max_activations import POINTS, scalars
from tests.helpers.trainers import one_layout, started

ROLES = ("projector", "language.attention", "language.ffn", "experts", "router")


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def records(tmp_path, **more) -> list[dict]:
    options = {"logging.max_activations_interval": 2, "logging.directory": str(tmp_path)} | more
    trainer = started(ROLES, **options)
    for _ in range(4):
        numbers, _, _ = trainer.step()
        trainer.log.step(trainer.state.iteration, numbers, show=False)
    trainer.log.close()
    return [json.loads(line) for line in (tmp_path / "activations.jsonl").read_text().splitlines()]


def test_every_second_step_is_recorded_layer_by_layer(tmp_path):
    found = records(tmp_path)
    assert [record["iteration"] for record in found] == [2, 4]
    for record in found:
        assert [row["layer"] for row in record["layers"]] == [0, 1, 2, 3]
        for row in record["layers"]:
            points = set(POINTS) if row["layer"] % 2 == 0 else set(POINTS) - {"router_logits"}  # sparse placement
            assert row.keys() == {"layer", *points} and all(
                value > 0 for value in row.values() if value != row["layer"]
            )
    assert scalars(found[0]["layers"])["activations/hidden/layer3"] == found[0]["layers"][3]["hidden"]


def test_a_spike_is_found_in_its_layer():
    """What comes after it is normalised again; what its own layer adds to the stream is not."""
    trainer = started(ROLES, **{"logging.max_activations_interval": 1})
    seen = []
    for factor in (1.0, 1000.0):
        with torch.no_grad():
            trainer.chunks[0].language_model.decoder.layers[2].self_attention.linear_proj.weight.mul_(factor)
        with trainer.max_activations.watch():
            trainer._forward_backward([trainer._next_batch() for _ in range(trainer.num_microbatches)], 1)
        seen.append(trainer.max_activations.collect(1.0))
    plain, spiked = seen
    assert spiked[2]["attention"] > 300 * plain[2]["attention"]
    assert spiked[1]["attention"] < 3 * plain[1]["attention"]
    assert spiked[2]["hidden"] > 10 * plain[2]["hidden"] and spiked[1]["hidden"] < 3 * plain[1]["hidden"]


def test_recording_changes_no_number_and_gradients_are_of_the_unscaled_loss(tmp_path):
    quiet = started(ROLES).step()[0]
    loud = started(ROLES, **{"logging.max_activations_interval": 1}).step()[0]
    assert (quiet["loss"], quiet["grad_norm"]) == (loud["loss"], loud["grad_norm"])
    exact = records(tmp_path / "fp32")[0]["layers"]
    scaled = records(tmp_path / "fp16", **{"training.precision": "fp16", "optimizer.initial_loss_scale": 2.0**10})[0]
    assert scaled["loss_scale"] == 2.0**10
    for one, two in zip(exact, scaled["layers"], strict=True):
        assert two["hidden_gradient"] == pytest.approx(one["hidden_gradient"], rel=0.05)
        assert two["hidden"] == pytest.approx(one["hidden"], rel=0.05)


@pytest.mark.parametrize("recompute", ["full", "moe"])
def test_recomputed_layers_are_seen_with_their_gradients(tmp_path, recompute):
    plain = records(tmp_path / "plain")[0]["layers"]
    again = records(tmp_path / "again", **{"training.recompute": recompute})[0]["layers"]
    for one, two in zip(plain, again, strict=True):
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_is_recorded_as_infinite(value):
    trainer = started(ROLES)
    with torch.no_grad():
        trainer.chunks[0].language_model.decoder.layers[1].self_attention.linear_proj.weight[0, 0] = float(value)
    with trainer.max_activations.watch():
        trainer._forward_backward([trainer._next_batch() for _ in range(trainer.num_microbatches)], 1)
    rows = trainer.max_activations.collect(1.0)
    assert rows[0]["hidden"] < float("inf") and rows[1]["attention"] == rows[1]["hidden"] == float("inf")
