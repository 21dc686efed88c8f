"""Experts in other places: the run goes on as it would have, with the same numbers."""

import json
import re
from dataclasses import replace

import pytest
import torch

from megatron_moellava.checkpoint.description import read_description, write_description
from megatron_moellava.checkpoint.folders import newest_checkpoint
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.commands.convert import main
from megatron_moellava.config import CheckpointError, MoEConfig
from megatron_moellava.conversion.inspection import diff
from megatron_moellava.conversion.place_experts import Placing, find_places, note, place_experts
from megatron_moellava.conversion.routing_log import ROUTING
from megatron_moellava.costs.shapes import model_from_json
from tests.helpers.trainers import one_layout, started, state

ROLES = ("projector", "language.attention", "experts", "router")
ORDER = [2, 0, 3, 1]
KINDS = {
    "plain": {},
    "bias and averages": {"moe.moe_router_enable_expert_bias": True, "optimizer.ema_decay": 0.5},
    "global balance": {"moe.moe_router_load_balancing_type": "global_aux_loss"},
    "by modality": {"moe.expert_groups.image": 2, "moe.expert_groups.text": 2, "moe.balance_per_modality": True},
    "muon": {"optimizer.optimizer": "muon"},
    "original": {
        "moe.router": "original",
        "moe.second_choice": "deterministic",
        "moe.moe_expert_capacity_factor": 4.0,
        "data.packing": False,
    },
}
# Sums in another order; Muon's iterations in bf16 make ten times more of them in each step.
TOLERANCE = {False: 1e-4, True: 1e-3}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def trainer_in(folder, **more):
    rows = "padded" if more.get("moe.router") == "original" else "packed"
    return started(ROLES, rows, **more, **{"checkpoint.save": str(folder), "optimizer.lr": 1e-2})


def trained(folder, **more):
    trainer = trainer_in(folder, **more)
    for _ in range(2):
        trainer.step()
    trainer.save()
    return trainer


def placings(folder, order=ORDER):
    layers = model_from_json(read_description(newest_checkpoint(folder)).model).moe_layers
    return [Placing(layer=layer, loads_E=[1.0] * 4, order=list(order), ranks=2) for layer in layers]


def goes_on(folder, like, **more):
    """A run from what `folder` holds, at the rows where `like` stands."""
    trainer = trainer_in(folder, **more)
    assert trainer.state.iteration == like.state.iteration == 2
    trainer.loader._step = 2
    trainer.loader._iterator = trainer.loader._batches()
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_on_as_it_would_have(kind, tmp_path):
    order = [1, 0, 3, 2] if kind == "by modality" else ORDER
    trainer = trained(tmp_path / "run", **KINDS[kind])
    placed = place_experts(tmp_path / "run", tmp_path / "placed", placings(tmp_path / "run", order))
    verify_checkpoint(placed)
    other = goes_on(tmp_path / "placed", trainer, **KINDS[kind])
    before, after = state(trainer), state(other)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all(".mlp.experts." in name or ".mlp.router." in name for name in moved)
    for _ in range(1 if kind == "muon" else 3):
        (expected, *_), (found, *_) = trainer.step(), other.step()
        for name in ("loss", "grad_norm", "load_balancing_loss"):
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE[kind == "muon"]), name
    before, after = state(trainer), state(other)
    rows = [name for name in before if ".mlp.router." in name and before[name].shape[:1] == (4,)]
    assert len(rows) >= 1
    for name in rows:
        torch.testing.assert_close(after[name], before[name][order], atol=1e-5 if kind != "muon" else 1e-3, rtol=1e-3)


def test_nothing_is_said_of_how_it_was_read(tmp_path, recwarn):
    trained(tmp_path / "run")
    recwarn.clear()
    place_experts(tmp_path / "run", tmp_path / "placed", placings(tmp_path / "run"))
    assert not recwarn.list


def test_places_that_do_not_change_change_nothing(tmp_path):
    trainer = trained(tmp_path / "run")
    place_experts(tmp_path / "run", tmp_path / "placed", placings(tmp_path / "run", range(4)))
    other = goes_on(tmp_path / "placed", trainer)
    trainer.step(), other.step()
    after = state(other)
    assert all(torch.equal(value, after[name]) for name, value in state(trainer).items())


def test_conversions_see_the_experts_in_their_new_places(tmp_path):
    trained(tmp_path / "run")
    place_experts(tmp_path / "run", tmp_path / "placed", placings(tmp_path / "run"))
    differences, same = diff(tmp_path / "run", tmp_path / "placed")
    # Of the router the rows, of two products of the experts all four, in each of the layers.
    assert {re.sub(r".*layers\.\d+\.", "", item.name) for item in differences} == {
        "mlp.router.weight",
        "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.experts.linear_fc2.weight",
    }
    back = [ORDER.index(expert) for expert in range(4)]
    place_experts(tmp_path / "placed", tmp_path / "back", placings(tmp_path / "run", back))
    assert diff(tmp_path / "run", tmp_path / "back") == ([], same + len(differences))


def test_an_adapter_does_not_move_without_its_base(tmp_path, capsys):
    trained(tmp_path / "run")
    folder = newest_checkpoint(tmp_path / "run")
    lora = {"lora": {"rank": 2}, "base": {"folder": "base", "seal": "0"}}
    write_description(folder, replace(read_description(folder), adapter=lora))
    assert main(["place-experts", str(tmp_path / "run"), "--expert-parallel", "2"]) == 2
    assert "moellava convert merge" in capsys.readouterr().err


def log(folder, loads, layers):
    lines = []
    for iteration, scale in ((1, 9), (2, 1), (3, 7)):  # the checkpoint is of step 2
        found = [
            {"layer": layer, "choices": [scale * load for load in loads], "dropped": [1, 0, 0, 0]} for layer in layers
        ]
        lines.append(json.dumps({"iteration": iteration, "layers": found if iteration < 3 else found[:1]}))
    (folder / ROUTING).write_text("\n".join(lines) + '\n{"iteration": 2, "lay')


def test_the_command_says_what_it_would_do_and_does_it_where_told(tmp_path, capsys):
    trained(tmp_path / "run")
    layers = [placing.layer for placing in placings(tmp_path / "run")]
    log(tmp_path / "run", [5, 4, 1, 1], layers)
    command = ["place-experts", str(tmp_path / "run"), "--expert-parallel", "2", "--records", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    # Dropped choices count: 6, 4, 1, 1; 10 of 12 against 7 of 12.
    assert f"layer {layers[0]}: busiest of 2 ranks 1.67 x the mean, 1.17 with 2 experts on other ranks" in said
    assert "would take 70% of its time" in said
    assert main([*command, "--save", str(tmp_path / "placed")]) == 0
    written = newest_checkpoint(tmp_path / "placed")
    assert written.name == "iter_0000002" and f"wrote {written}" in capsys.readouterr().out
    (orders,) = read_description(written).provenance["expert_places"]
    assert orders.keys() == {str(layer) for layer in layers}
    log(tmp_path / "placed", [5, 4, 1, 1], layers)
    again = [*command[:1], str(tmp_path / "placed"), *command[2:], "--save", str(tmp_path / "again")]
    assert main(again) == 2
    assert "up to step 2 since experts changed places at step 2" in capsys.readouterr().err
    log(tmp_path / "run", [1, 1, 1, 1], layers)
    assert main([*command, "--save", str(tmp_path / "again")]) == 0
    assert "no place is better than today's" in capsys.readouterr().out and not (tmp_path / "again").exists()


def test_what_cannot_be_placed_is_refused_in_a_sentence(tmp_path, capsys):
    trained(tmp_path / "run")
    run = ["place-experts", str(tmp_path / "run")]
    for more, says in (
        ([], "--expert-parallel 1, as the run has it: give a number of ranks above 1 that divides the 4 experts"),
        (["--expert-parallel", "1"], "--expert-parallel 1: give a number of ranks above 1"),
        (["--expert-parallel", "3"], "divides the 4 experts"),
        (["--expert-parallel", "2", "--routing", str(tmp_path / "none.jsonl")], "none.jsonl does not exist"),
    ):
        assert main([*run, *more]) == 2
        assert says in capsys.readouterr().err
    layers = [placing.layer for placing in placings(tmp_path / "run")]
    for content, says in (
        ("", "no observation"),
        (
            '{"iteration": 1, "layers": [{"layer": 77, "choices": [1, 1, 1, 1], "dropped": [0, 0, 0, 0]}]}',
            "is not of this model",
        ),
        (
            f'{{"iteration": 1, "layers": [{{"layer": {layers[0]}, "choices": [1, 1], "dropped": [0, 0]}}]}}',
            "is not of this model",
        ),
        ("not JSON", "no observation"),
    ):
        (tmp_path / "run" / ROUTING).write_text(content)
        assert main([*run, "--expert-parallel", "2"]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="holds a run already"):
        place_experts(tmp_path / "run", tmp_path / "run", placings(tmp_path / "run"))
    description = read_description(newest_checkpoint(tmp_path / "run"))
    config = description.config | {"training": description.config["training"] | {"fp8_recipe": "delayed"}}
    with pytest.raises(CheckpointError, match="histories of every expert"):
        find_places(replace(description, config=config), tmp_path / "run" / ROUTING, 2)
    started_dense = started(ROLES[:2], moe=None, **{"checkpoint.save": str(tmp_path / "dense")})
    started_dense.step()
    started_dense.save()
    assert main(["place-experts", str(tmp_path / "dense"), "--expert-parallel", "2"]) == 2
    assert "no experts" in capsys.readouterr().err


def test_a_note_where_noise_is_drawn_for_places():
    sampled = MoEConfig(router="original", moe_router_topk=2, second_choice="sampled")
    assert "second choices of training are other ones" in note(sampled)
    assert "tokens that a full expert keeps" in note(replace(sampled, moe_router_topk=1))
    assert note(replace(sampled, second_choice="deterministic")) == note(MoEConfig()) == note(None) == ""


def test_a_checkpoint_that_was_placed_before_stays_whole(tmp_path):
    """Its rewritten routers are a data file that the next one links."""
    trained(tmp_path / "run")
    once = place_experts(tmp_path / "run", tmp_path / "once", placings(tmp_path / "run"))
    twice = place_experts(tmp_path / "once", tmp_path / "twice", placings(tmp_path / "run"))
    verify_checkpoint(once), verify_checkpoint(twice)
    at_once = [ORDER[expert] for expert in ORDER]
    place_experts(tmp_path / "run", tmp_path / "at once", placings(tmp_path / "run", at_once))
    assert diff(tmp_path / "twice", tmp_path / "at once")[0] == []
