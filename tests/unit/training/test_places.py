"""Experts that change places in a run: in one process the exchange itself, and when it is worth one."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import complete_iterations, newest_checkpoint
from megatron_moellava.checkpoint.verification import verify_checkpoint
from megatron_moellava.config import CheckpointError
from megatron_moellava.conversion.place_experts import Placing, placed
from megatron_moellava.conversion.routing_log import ROUTING
from megatron_moellava.training import checkpoint as checkpoints
from megatron_moellava.training.places import better_places, said_of, take_places
from tests.helpers.trainers import one_layout, started, state

ROLES = ("projector", "language.attention", "experts", "router")
ORDER = [2, 0, 3, 1]
KINDS = {
    "sequential": {"moe.moe_grouped_gemm": False},
    "bias and averages": {"moe.moe_router_enable_expert_bias": True, "optimizer.ema_decay": 0.5},
    "bf16": {"training.precision": "bf16"},
    "muon": {"optimizer.optimizer": "muon"},
}
# Sums in another order; in bf16 (Muon's iterations are, too) they round to other numbers.
TOLERANCE = {"muon": 1e-3, "bf16": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def after_two_steps(folder, **more):
    trainer = started(ROLES, **more, **{"checkpoint.save": str(folder), "optimizer.lr": 1e-2})
    trainer.step(), trainer.step()
    return trainer


def placings(trainer, order=ORDER):
    layers = trainer.chunks[0].sizes().moe_layers
    return [Placing(layer=layer, loads_E=[3, 1, 3, 1], order=list(order), ranks=2) for layer in layers]


def written(trainer, folder, order=ORDER):
    return trainer._write(folder, 2, None, None, placings(trainer, order))


def undone(tensors, order=ORDER):
    """By the names and rows of before the exchange."""
    before = {}
    for name, value in tensors.items():
        if ".mlp.router." in name and value.shape[:1] == (len(order),):
            value = value[[order.index(expert) for expert in range(len(order))]]
        found = re.match(r"(.*\.mlp\.experts\..*?)(\d+)(\.linear_fc.*)?$", name)  # weight3, local_experts.3.linear_fc1
        if found:
            name = f"{found[1]}{order[int(found[2])]}{found[3] or ''}"
        before[name] = value
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_goes_on_as_it_would_have(kind, tmp_path):
    stays, moves = (after_two_steps(tmp_path / name, **KINDS[kind]) for name in ("stays", "moves"))
    generators = torch.get_rng_state()
    checkpoint = written(moves, tmp_path / "moves")
    take_places(checkpoint, moves.chunks, moves.optimizer)
    assert torch.equal(torch.get_rng_state(), generators)
    before, after = state(stays), state(moves)
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert moved and all(".mlp.experts." in name or ".mlp.router." in name for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in undone(after).items())
    tolerance = TOLERANCE.get(kind, 1e-4)
    for _ in range(1 if kind == "muon" else 3):
        (expected, *_), (found, *_) = stays.step(), moves.step()
        for name in ("loss", "grad_norm", "load_balancing_loss", "lr"):
            assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    before, after = state(stays), undone(state(moves))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=10 * tolerance * float(value.abs().max()), rtol=0.0)


def test_a_kill_leaves_one_whole_checkpoint_at_any_moment(tmp_path, monkeypatch):
    trainer = after_two_steps(tmp_path)
    trainer.save()
    trainer.step()
    own = state(trainer)

    def die(*_):
        raise KeyboardInterrupt  # nothing looks after it, as nothing does after a kill

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(checkpoints, "write_description", die)
        written(trainer, tmp_path)
    assert (tmp_path / "iter_0000003.tmp" / "__places_0.distcp").exists(), "experts had changed places in it"
    assert [path.name for path in complete_iterations(tmp_path)] == ["iter_0000002"]
    verify_checkpoint(newest_checkpoint(tmp_path))
    checkpoint = written(trainer, tmp_path)
    # Killed before it has taken them: the folder is complete, and a run goes on from it.
    verify_checkpoint(checkpoint)
    assert checkpoint.name == "iter_0000003" == newest_checkpoint(tmp_path).name
    other = started(ROLES, **{"checkpoint.save": str(tmp_path), "optimizer.lr": 1e-2})
    assert other.state.iteration == 3
    assert all(torch.equal(value, own[name]) for name, value in undone(state(other)).items())


def test_what_cannot_be_exchanged_ends_the_save_on_all_ranks(tmp_path):
    trainer = after_two_steps(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"cannot write the checkpoint .*rank 0: .* not one for each of 3 experts"
    ):
        written(trainer, tmp_path, order=[0, 2, 1])
    assert not list(tmp_path.glob("iter_*"))


def log(folder, *lines):
    """`lines`: (iteration, choices in layer 0, choices in layer 2)."""
    records = [
        {
            "iteration": iteration,
            "layers": [
                {"layer": layer, "choices": choices, "dropped": [0] * 4}
                for layer, choices in zip((0, 2), rows, strict=True)
            ],
        }
        for iteration, *rows in lines
    ]
    (folder / ROUTING).write_text("".join(json.dumps(record) + "\n" for record in records))


def asked(folder, share, provenance=None, iteration=40):
    """What `better_places` finds for a run on two ranks."""
    trainer = started(("router",), **{"checkpoint.place_experts": share})
    parallel = replace(trainer.run.parallel, expert_model_parallel_size=2)
    run = replace(trainer.run, parallel=parallel)
    moment = SimpleNamespace(provenance=provenance or {}, iteration=iteration)
    return better_places(run, trainer.chunks[0].sizes(), folder, moment), trainer.chunks[0].sizes()


def test_experts_move_where_the_run_asks_for_what_it_saves(tmp_path):
    # Layer 0: 10 of 12 choices on the first rank, 1.67 x the mean, and 1.17 at best; layer 2 is level. 1.33 against 1.08.
    log(tmp_path, (10, [6, 4, 1, 1], [3, 3, 3, 3]), (20, [6, 4, 1, 1], [3, 3, 3, 3]), (50, [1, 1, 6, 6], [9, 0, 0, 0]))
    found, model = asked(tmp_path, 0.18)
    assert [placing.moved for placing in found] == [2, 0]
    said = said_of(found, model)
    assert said == (
        "2 experts have changed ranks: the busiest of 2 has 1.08 x the mean load where it had 1.33, by the newest observations"
    )
    assert asked(tmp_path, 0.19)[0] == [] == asked(tmp_path, None)[0]
    assert asked(None, 0.1)[0] == [], "a run whose log could not be written"


def test_observations_of_other_places_do_not_count(tmp_path):
    level = [3, 3, 3, 3]
    before, since = ([6, 4, 1, 1], level), ([6, 1, 4, 1], level)
    log(tmp_path, (5, *before), (10, *before), (20, *since), (30, *since))
    moved = placed({}, {0: [0, 2, 1, 3], 2: [0, 1, 2, 3]}, 10)
    assert asked(tmp_path, 0.1, iteration=19)[0] != []
    assert asked(tmp_path, 0.01, moved)[0] == []  # 7 and 5, which no exchange levels
    assert asked(tmp_path, 0.01, moved, iteration=19)[0] == [], "none since"


def test_chance_moves_no_expert(tmp_path):
    """Of even experts whose counts differ by what sampling does, the counts of one moment promise what the next takes back."""
    level = [300, 300, 300, 300]
    log(tmp_path, (10, [330, 320, 280, 270], level), (20, [280, 310, 330, 280], level))
    assert asked(tmp_path, 0.01)[0] == []
    log(tmp_path, (10, [330, 320, 280, 270], level), (20, [330, 310, 280, 280], level))
    lasting, _ = asked(tmp_path, 0.01)
    assert [placing.loads_E for placing in lasting] == [[660, 630, 560, 550], [600] * 4], "found again by both"
    log(tmp_path, (10, [600, 400, 100, 100], level))
    assert asked(tmp_path, 0.01)[0] == [], "nothing to judge it by"
    log(tmp_path, *((step, [600, 400, 100, 100], [0] * 4) for step in (10, 20)))
    assert asked(tmp_path, 0.01)[0] == [], "a layer that nobody asked says nothing"


def test_a_log_that_says_nothing_of_this_model_ends_no_run(tmp_path, capsys):
    log(tmp_path, (10, [6, 4, 1, 1], [3, 3, 3, 3]))
    (tmp_path / ROUTING).write_text((tmp_path / ROUTING).read_text().replace('"layer": 2', '"layer": 7'))
    assert asked(tmp_path, 0.01)[0] == []
    assert "note: experts stay where they are" in capsys.readouterr().out


def test_a_note_goes_with_them_where_noise_is_drawn_for_places(tmp_path):
    log(tmp_path, *((step, [6, 4, 1, 1], [3, 3, 3, 3]) for step in (10, 20)))
    found, model = asked(tmp_path, 0.1)
    sampled = replace(model, moe=replace(model.moe, router="original", second_choice="sampled"))
    assert "second choices" in said_of(found, sampled)


def test_run_json_tells_the_order_and_the_step(tmp_path):
    trainer = after_two_steps(tmp_path)
    trainer.state.provenance = placed(trainer.state.provenance, {0: ORDER, 2: ORDER}, 2)
    provenance = read_description(written(trainer, tmp_path)).provenance
    assert provenance["expert_places"] == [{"0": ORDER, "2": ORDER}] and provenance["experts_placed_at"] == 2
