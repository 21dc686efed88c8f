"""fp16: the loss is scaled and the gradients are not; a step that overflows leaves everything as it was but the scale."""

import math

import pytest
import torch

from megatron_moellava.checkpoint.description import read_description
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.training.loop import Trainer, TrainingDiverged
from megatron_moellava.training.optimizer import distributed_optimizers, optimizer_step_count
from tests.distributed.rows import Rows
from tests.helpers.runs import problems
from tests.helpers.trainers import one_layout, started, state

ROLES = ("projector", "language.attention", "language.ffn", "experts", "router")
FP16 = {"training.precision": "fp16"}


@pytest.fixture(scope="module", autouse=True)
def one_process():
    with one_layout():
        yield


def poisoned(trainer: Trainer) -> None:
    """From now on the gradients of the experts, and only theirs, overflow."""
    update = trainer.update

    def spoil():
        for wrapped in trainer.wrapped:
            for buffer in wrapped.expert_parallel_buffers:
                buffer.grad_data.fill_(math.inf)
        return update()

    trainer.update = spoil


def first_moments(trainer: Trainer) -> float:
    """The size of the gradients that Adam was given, after clipping."""
    states = (state for part in distributed_optimizers(trainer.optimizer) for state in part.optimizer.state.values())
    return sum(float(state["exp_avg"].abs().sum()) for state in states)


def test_gradients_are_those_of_the_unscaled_loss():
    found = {}
    for scale in (2.0**6, 2.0**12):
        trainer = started(ROLES, **FP16, **{"optimizer.initial_loss_scale": scale})
        numbers, applied, _ = trainer.step()
        assert applied and numbers["loss_scale"] == scale
        assert {part.grad_scaler for part in trainer.optimizer.chained_optimizers} == {trainer.loss_scale}
        found[scale] = numbers | {"moments": first_moments(trainer)}
    plain = started(ROLES)
    exact = plain.step()[0]
    assert "loss_scale" not in exact
    for numbers in found.values():
        assert numbers["loss"] == pytest.approx(exact["loss"], rel=2e-3)
        assert numbers["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-3)
        assert numbers["moments"] == pytest.approx(first_moments(plain), rel=1e-2)
        assert numbers["load_balancing_loss"] == pytest.approx(exact["load_balancing_loss"], rel=1e-2)


def test_a_step_that_overflows_changes_the_scale_alone():
    """fp16 ends at 65,504, so a scale of 2**40 cannot be; hysteresis waits for a second overflow."""
    trainer = started(ROLES, **FP16, **{"optimizer.initial_loss_scale": 2.0**40})
    before, seen = state(trainer), []
    for _ in range(3):
        numbers, applied, _ = trainer.step()
        assert not applied and numbers["skipped"] == 1.0
        seen.append(numbers["loss_scale"])
    assert seen == [2.0**40, 2.0**40, 2.0**39] and float(trainer.loss_scale.scale) == 2.0**38
    assert all(torch.equal(before[name], value) for name, value in state(trainer).items())
    assert (trainer.scheduler.num_steps, optimizer_step_count(trainer.optimizer)) == (0, 0)
    trainer.loss_scale.from_json({"scale": 2.0**10, "growth_tracker": 0, "hysteresis_tracker": 2})
    assert trainer.step()[1] and trainer.scheduler.num_steps == 1
    assert any(not torch.equal(before[name], value) for name, value in state(trainer).items())


def test_experts_that_overflow_alone_are_divided_by_what_the_loss_was_multiplied_by():
    options = {"optimizer.initial_loss_scale": 2.0**12, "optimizer.hysteresis": 1}
    untouched = started(ROLES, **FP16, **options).step()[0]["grad_norm"]
    trainer = started(ROLES, **FP16, **options)
    assert len(distributed_optimizers(trainer.optimizer)) == 2, "dense and expert parameters"
    good = trainer.update
    poisoned(trainer)
    assert not trainer.step()[1] and float(trainer.loss_scale.scale) == 2.0**11
    trainer.update = good
    trainer.loader = Rows("packed", trainer.chunks[0].backbone.vocab_size, trainer.chunks[0].tower, 0, 1)
    assert trainer.step()[0]["grad_norm"] == pytest.approx(untouched, rel=5e-3)


def test_many_good_steps_double_the_scale():
    trainer = started(("projector",), **FP16, **{"optimizer.initial_loss_scale": 8.0, "optimizer.loss_scale_window": 2})
    scales = [trainer.step()[0]["loss_scale"] for _ in range(4)]
    assert scales == [8.0, 8.0, 16.0, 16.0]


def test_overflows_that_a_smaller_scale_mends_do_not_end_a_run(capsys):
    options = {"optimizer.initial_loss_scale": 2.0**36, "optimizer.hysteresis": 1, "training.non_finite_patience": 2}
    trainer = started(("projector",), **FP16, **options)
    trainer.train_steps = 30
    trainer._report_data = lambda: None
    assert trainer.train() == 0
    said = capsys.readouterr().out
    assert "overflows in fp16; the loss scale is now 3.43597e+10" in said
    assert optimizer_step_count(trainer.optimizer) > 0


def test_overflows_at_the_smallest_scale_end_it():
    options = {"optimizer.initial_loss_scale": 2.0, "optimizer.min_loss_scale": 1.0, "optimizer.hysteresis": 1}
    trainer = started(ROLES, **FP16, **options, **{"training.non_finite_patience": 2})
    trainer._report_data = lambda: None
    poisoned(trainer)
    way_out = r"2 steps in a row.* take training\.precision=bf16, or lower optimizer\.lr"
    with pytest.raises(TrainingDiverged, match=way_out):
        trainer.train()
    assert trainer.state.iteration == 2  # the first lowers the scale to the smallest: it counts like the second


def test_the_scale_and_its_counts_are_resumed(tmp_path):
    options = {
        "optimizer.initial_loss_scale": 2.0**40,
        "checkpoint.save": str(tmp_path),
        "checkpoint.save_interval": 10,
    }
    trainer = started(("projector",), **FP16, **options)
    for _ in range(3):
        trainer.step()
    trainer.save()
    saved = trainer.loss_scale.to_json()
    assert saved == {"scale": 2.0**38, "growth_tracker": 0, "hysteresis_tracker": -1}
    assert read_description(require_checkpoint(tmp_path)).loss_scale == saved
    again = started(("projector",), **FP16, **options | {"optimizer.initial_loss_scale": 2.0**5})
    assert again.loss_scale.to_json() == saved and again.state.iteration == 3
    plain = started(("projector",), **options | {"checkpoint.save": str(tmp_path / "fp32")})
    plain.step()
    plain.save()
    assert '"loss_scale"' not in (require_checkpoint(tmp_path / "fp32") / "run.json").read_text()


def test_what_goes_with_sixteen_bits():
    for settings, message in (
        (
            {"training.precision": "fp16", "training.fp8_recipe": "tensorwise"},
            "with training.precision=fp16: FP8's scales",
        ),
        (
            {"training.precision": "fp16", "optimizer.main_params_dtype": "bf16"},
            "main_params_dtype=bf16 with training.precision",
        ),
        ({"training.precision": "bf16", "optimizer.stochastic_rounding": True}, "fp32 weights are not rounded"),
        ({"training.precision": "fp16", "optimizer.initial_loss_scale": 0.5}, "min_loss_scale=1.0 is more than"),
    ):
        assert message in problems(1, **settings)
