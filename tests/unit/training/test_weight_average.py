"""Averaged weights: by their formula, without a trace in the training, through checkpoints and into one of their own."""

import pytest
import torch

from megatron_moellava.training.optimizer import distributed_optimizers
from megatron_moellava.training.weight_average import averages_in_place, decay_of
from tests.helpers.trainers import one_layout, started, state

ROLES = ("projector", "language.attention", "experts", "router")
EMA = {"optimizer.ema_decay": 0.6, "optimizer.lr": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def averages(trainer) -> dict[str, torch.Tensor]:
    with averages_in_place(distributed_optimizers(trainer.optimizer), trainer.wrapped):
        return state(trainer)


def goes_on(trainer, step: int):
    trainer.loader._step = step
    trainer.loader._iterator = trainer.loader._batches()
    return trainer


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_average_is_that_of_the_formula_and_leaves_no_trace(one_process):
    trainer, plain = started(ROLES, **EMA), started(ROLES, **{"optimizer.lr": 1e-2})
    expected: dict[str, torch.Tensor] = {}
    for update in range(1, 5):
        assert trainer.step()[1] and plain.step()[1]
        now = state(trainer)
        assert same(now, state(plain))
        keep = min(0.6, (1 + update) / (10 + update))
        expected = {name: keep * expected.get(name, value) + (1 - keep) * value for name, value in now.items()}
    found = averages(trainer)
    assert same(state(trainer), now)
    moved = {name for name, parameter in trainer.chunks[0].named_parameters() if parameter.requires_grad}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(value, now[name]) == (name not in moved), name


def test_a_short_run_forgets_its_start():
    assert [decay_of(update, 0.999) for update in (1, 8, 90, 10_000)] == [2 / 11, 0.5, 0.91, 0.999]


def test_bf16_weights_come_back_bit_by_bit(one_process):
    trainer = started(ROLES, **EMA, **{"training.precision": "bf16"})
    for _ in range(3):
        trainer.step()
    before, found = state(trainer), averages(trainer)
    assert same(state(trainer), before)
    assert not same(found, before)


def test_a_skipped_step_has_no_part(one_process, monkeypatch):
    trainer = started(ROLES, **EMA)
    trainer.step()
    before = averages(trainer)
    parameter = next(parameter for parameter in trainer.chunks[0].parameters() if parameter.requires_grad)
    reduce = trainer._finalize_gradients

    def poisoned(*arguments, **options):
        reduce(*arguments, **options)
        parameter.main_grad.fill_(float("nan"))

    monkeypatch.setattr(trainer.chunks[0].config, "finalize_model_grads_func", poisoned)
    assert not trainer.step()[1]
    assert same(averages(trainer), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_process):
    """A run of three updates with an average, and one without."""
    folder = tmp_path_factory.mktemp("averages")
    for name, more in (("with", EMA), ("without", {"optimizer.lr": 1e-2})):
        trainer = started(ROLES, **more, **{"checkpoint.save": str(folder / name)})
        for _ in range(3):
            trainer.step()
        trainer.save()
    return folder


def test_the_same_command_goes_on_with_the_same_average(folder):
    resumed = goes_on(started(ROLES, **EMA, **{"checkpoint.save": str(folder / "with")}), 3)
    assert resumed.state.iteration == 3
    whole = started(ROLES, **EMA)
    for _ in range(4):
        whole.step()
    resumed.step()
    assert same(state(resumed), state(whole))
    assert same(averages(resumed), averages(whole))


def test_a_run_that_had_none_begins_with_its_weights(folder, capsys):
    resumed = goes_on(started(ROLES, **EMA, **{"checkpoint.save": str(folder / "without")}), 3)
    assert "optimizer.ema_decay=none then, 0.6 now (a new average begins" in capsys.readouterr().out
    before = state(resumed)
    assert same(averages(resumed), before)
    resumed.step()
    keep, now, found = 5 / 14, state(resumed), averages(resumed)
    for name, value in found.items():
        torch.testing.assert_close(value, keep * before[name] + (1 - keep) * now[name], rtol=1e-6, atol=1e-7)


def test_a_run_may_drop_its_average(folder):
    resumed = started(ROLES, **{"optimizer.lr": 1e-2, "checkpoint.save": str(folder / "with")})
    moments = {
        key for part in distributed_optimizers(resumed.optimizer) for s in part.optimizer.state.values() for key in s
    }
    assert moments == {"exp_avg", "exp_avg_sq", "step"}
