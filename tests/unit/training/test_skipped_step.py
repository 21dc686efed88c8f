"""A step without a finite gradient leaves everything as it was but the data and the generators, whatever the run keeps."""

from collections.abc import Iterator

import pytest
import torch

from megatron_moellava.data.batch import Batch
from megatron_moellava.data.loader import Batches
from megatron_moellava.stages import ROLES
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.optimizer import distributed_optimizers, optimizer_step_count
from tests.distributed.rows import Rows
from tests.helpers.trainers import one_layout, started
from tests.helpers.trainers import state as tensors_of

RUNS = {
    "dense": {"moe": None},
    "megatron": {},
    "expert bias": {"moe.moe_router_enable_expert_bias": True, "moe.moe_router_bias_update_rate": 0.1},
    "bias and capacity": {"moe.moe_router_enable_expert_bias": True, "moe.moe_expert_capacity_factor": 0.5},
    "global aux loss": {"moe.moe_router_load_balancing_type": "global_aux_loss", "moe.moe_z_loss_coeff": 0.1},
    "original": {"rows": "padded", "moe.router": "original", "moe.moe_expert_capacity_factor": 0.5,
                 "moe.second_choice": "deterministic"},
    "residual": {"moe.use_residual": True},
    "fp8 delayed": {"training.fp8_recipe": "delayed"},
    "fp8 and bias": {"training.fp8_recipe": "delayed", "moe.moe_router_enable_expert_bias": True},
    "bf16": {"training.precision": "bf16"},
    "recompute": {"training.recompute": "full", "moe.moe_router_enable_expert_bias": True},
    "warm-up": {"optimizer.lr_warmup_fraction": 0.5, "optimizer.router_lr_warmup_fraction": 0.8},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_layout():
    with one_layout():
        yield


class Spoilt(Batches):
    """The rows of a run with steps before them that have no finite gradient: their pictures are NaN."""

    def __init__(self, rows: Iterator[Batch], spoilt: Iterator[Batch], count: int):
        self.rows, self.spoilt, self.left = rows, spoilt, count

    def __next__(self) -> Batch:
        if not self.left:
            return next(self.rows)
        self.left -= 1
        batch = next(self.spoilt)
        batch.pixel_values_NCHW = torch.full_like(batch.pixel_values_NCHW, float("nan"))
        return batch


def trainer_of(name: str) -> Trainer:
    trainer = started(tuple(ROLES), **{"logging.routing_interval": 1, "optimizer.lr": 1e-3} | RUNS[name])
    trainer.optimizer.reload_model_params()
    return trainer


def spoil(trainer: Trainer, name: str) -> None:
    """The first step of the run is spoilt; what comes after it is what an undisturbed run begins with."""
    kind = RUNS[name].get("rows", "packed")
    more = Rows(kind, trainer.chunks[0].backbone.vocab_size, trainer.chunks[0].tower, 0, 1)
    trainer.loader = Spoilt(trainer.loader, more, trainer.num_microbatches)


def everything(trainer: Trainer) -> dict[str, object]:
    """What a step may move, by name."""
    (model,) = trainer.chunks
    found: dict[str, object] = {name: p.detach().clone() for name, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    for number, part in enumerate(distributed_optimizers(trainer.optimizer)):
        for index, state in enumerate(part.optimizer.state.values()):
            found |= {f"optimizer {number}.{index}.{key}": torch.as_tensor(v).clone() for key, v in state.items()}
        for index, group in enumerate(part.optimizer.param_groups):
            found |= {f"group {number}.{index}.{key}": group[key] for key in ("lr", "step") if key in group}
    for number, scaling in enumerate(trainer.fp8.scalings if trainer.fp8 else []):
        found |= {f"fp8 {number} history": scaling.history_TKE.clone(), f"fp8 {number} seen": scaling.seen_KE.clone()}
    found["schedule"] = trainer.scheduler.num_steps
    found["updates"] = optimizer_step_count(trainer.optimizer)
    for layer, router in trainer.routing["language"].observer.routers.items() if trainer.routing else ():
        found |= {f"losses {layer}": dict(router.losses), f"counts {layer}": router.counts_of_step_P1E}
    found["statistics"] = dict(trainer.routing["language"].sums) if trainer.routing else {}
    return found


def differing(here: dict[str, object], there: dict[str, object]) -> set[str]:
    assert here.keys() == there.keys()
    return {name for name, value in here.items() if not equal(value, there[name])}


def equal(one: object, two: object) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("name", RUNS)
def test_a_skipped_step_moves_nothing_and_the_next_is_that_of_a_run_without_it(name):
    undisturbed = trainer_of(name)
    first, _, _ = undisturbed.step()
    expected = everything(undisturbed)

    trainer = trainer_of(name)
    spoil(trainer, name)
    records: list[int] = []
    trainer.log.routing = lambda iteration, record, component: records.append(iteration)
    before = everything(trainer)
    skipped, applied, _ = trainer.step()
    assert (applied, skipped["skipped"], trainer.state.iteration) == (False, 1.0, 1)
    assert (
        trainer.state.consumed_samples == skipped["samples"] > 0
    )  # its samples have been read, and are not read again
    assert differing(everything(trainer), before) == set()

    second, applied, _ = trainer.step()
    assert applied
    assert {key: second[key] for key in ("loss", "lr", "grad_norm")} == {
        key: first[key] for key in ("loss", "lr", "grad_norm")
    }
    assert differing(everything(trainer), expected) == set()
    assert records == ([2] if trainer.routing else []), "what the routers of a skipped step did is no statistics"


@pytest.mark.parametrize("name", ["megatron", "expert bias", "fp8 delayed"])
def test_a_gradient_alone_that_is_not_finite_skips_the_step(name):
    trainer = trainer_of(name)
    hook = trainer.chunks[0].language_model.output_layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = everything(trainer)
    _, applied, _ = trainer.step()
    hook.remove()
    assert not applied
    assert differing(everything(trainer), before) == set()


@pytest.mark.parametrize("more", [{}, {"optimizer.ema_decay": 0.5}], ids=["adam", "averaged"])
def test_a_run_whose_first_steps_were_skipped_goes_on_after_a_checkpoint(tmp_path, more):
    """Moments are made for the checkpoint, and the first update must not take them for those of an earlier one."""
    roles, options = ("projector", "experts", "router"), {"optimizer.lr": 1e-2, **more}
    saved, plain = started(roles, **options, **{"checkpoint.save": str(tmp_path)}), started(roles, **options)
    saved.state.iteration = 1
    saved.save()
    for trainer in (saved, plain):
        assert trainer.step()[1]
    one, other = tensors_of(saved), tensors_of(plain)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
