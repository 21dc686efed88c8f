"""Switches that keep the routers stable: their dtype, and a warm-up of their own; and what validation says about them."""

from dataclasses import replace

import pytest
import torch

from megatron_moellava import parallel
from megatron_moellava.config import (
    LoggingConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    ProjectorMoEConfig,
    RoleOptions,
    RolesConfig,
    TowerMoEConfig,
)
from megatron_moellava.model.roles import parameter_roles
from megatron_moellava.training.loop import Trainer
from megatron_moellava.training.optimizer import distributed_optimizers, overlaps, rate_after
from tests.helpers.batches import Repeated, words
from tests.helpers.inference_models import scatter, tiny_run
from tests.helpers.runs import problems, tiny

from megatron.core.distributed import DistributedDataParallel

STEPS = 20


def trainer(
    moe: MoEConfig | None, precision: str = "bf16", stage: int = 3, vision: dict | None = None, **optimizer
) -> Trainer:
    parallel.initialize(ParallelConfig(), 1)
    run = replace(tiny_run(moe), **vision or {})
    run = replace(
        run,
        training=replace(
            run.training,
            stage=stage,
            precision=precision,
            micro_batch_size=2,
            global_batch_size=2,
            trains=("tower", "projector") if vision else None,
        ),
        optimizer=OptimizerConfig(lr=1e-3, lr_decay_style="constant", lr_warmup_fraction=0.0, **optimizer),
        logging=LoggingConfig(tensorboard=False),
    )
    started = Trainer(run, Repeated([words()]), STEPS)
    scatter(started.chunks[0])
    return started


def routers(started: Trainer) -> list:
    return list(started.routing["language"].observer.routers.values())


@pytest.mark.parametrize("router", ["megatron", "original"])
def test_bf16_router_computes_in_bf16_and_trains(router):
    moe = MoEConfig(
        router=router, moe_expert_capacity_factor=1.5 if router == "original" else None, second_choice="deterministic"
    )
    outputs = {}
    for dtype in ("fp32", "bf16"):
        started = trainer(replace(moe, moe_router_dtype=dtype))
        seen: list = []
        for layer in routers(started):
            layer.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append(output[0].detach()))
        before = [layer.weight.clone() for layer in routers(started)]
        numbers, applied, _ = started.step()
        assert applied and numbers["loss"] > 0
        assert all(not torch.equal(layer.weight, old) for layer, old in zip(routers(started), before, strict=True))
        assert routers(started)[0].weight.dtype == torch.float32
        outputs[dtype] = seen
    assert {output.dtype for output in outputs["fp32"]} == {torch.float32}
    assert {output.dtype for output in outputs["bf16"]} == {torch.bfloat16}


def test_an_update_gathers_every_parameter_once(monkeypatch):
    """Dense and expert parameters have an optimizer each, and each of them would gather the parameters of both."""
    started = trainer(MoEConfig())
    gathered: list = []
    gather = DistributedDataParallel._start_bucket_group_param_sync
    monkeypatch.setattr(
        DistributedDataParallel,
        "_start_bucket_group_param_sync",
        lambda self, group, *args, **options: gathered.append(group) or gather(self, group, *args, **options),
    )
    started.step()
    (wrapped,) = started.wrapped
    groups = [group for group in wrapped.bucket_groups + wrapped.expert_parallel_bucket_groups if group.buckets]
    assert len(groups) >= 2
    assert sorted(map(id, gathered)) == sorted(map(id, groups))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("use_residual", [False, True])
def test_a_checkpoint_gets_every_parameter_its_own_states(stage, use_residual):
    """Routers are fp32 among bf16 parameters, and which come first depends on what is trained."""
    started = trainer(MoEConfig(use_residual=use_residual), stage=stage)
    every_parameter_has_its_own_states(started)


def test_routers_of_tower_and_projector_are_routers_to_the_optimizer():
    vision = {"tower_moe": TowerMoEConfig(), "projector_moe": ProjectorMoEConfig()}
    started = trainer(None, stage=2, vision=vision, router_lr_warmup_fraction=0.5)
    every_parameter_has_its_own_states(started)
    groups = [group for group in started.optimizer.param_groups if group.get("is_router") and group["params"]]
    model = started.chunks[0]
    sizes = sum(parameter.numel() for group in groups for parameter in group["params"])
    expected = 4 * (model.tower.num_used_layers * model.tower.hidden_size + model.tower.projector_input_size)
    assert sizes == expected and {group["lr"] for group in groups} == {0.0}


def every_parameter_has_its_own_states(started: Trainer) -> None:
    started.optimizer.reload_model_params()
    seen = 0
    for part in distributed_optimizers(started.optimizer):
        for parameter in part.model_param_group_index_map:
            main = part._get_main_param_and_optimizer_states(parameter)["param"]
            assert torch.equal(main.to(parameter.dtype), parameter.detach().flatten())
            seen += 1
    assert seen == sum(parameter.requires_grad for parameter in started.chunks[0].parameters())


def test_router_warmup_slows_the_routers_alone():
    started = trainer(MoEConfig(), "fp32", router_lr_warmup_fraction=0.5)
    others = [parameter for name, parameter in started.chunks[0].named_parameters() if "experts" in name]
    rates, moves = [], []
    for _ in range(STEPS):
        rates.append({group["lr"] for group in started.optimizer.param_groups if group["params"]})
        before = [layer.weight.clone() for layer in routers(started)], [other.clone() for other in others]
        started.step()
        moves.append(
            [
                max(float((new - old).detach().abs().max()) for new, old in zip(now, then, strict=True))
                for now, then in zip(([layer.weight for layer in routers(started)], others), before, strict=True)
            ]
        )
    assert rates[1] == {1e-3, 1e-4}  # a tenth of the way
    assert rates[-1] == {1e-3}
    assert moves[0][0] == 0.0 < moves[0][1]
    assert 0 < moves[1][0] < moves[-1][0]


def test_overlap_is_on_by_itself_on_gpus_only():
    parallel.initialize(ParallelConfig(), seed=1)
    assert overlaps(tiny()) == (False, False)
    assert overlaps(tiny(optimizer__overlap_grad_reduce=True)) == (True, False)
    assert overlaps(tiny(optimizer__overlap_grad_reduce=True, optimizer__overlap_param_gather=True)) == (True, True)
    parallel.shutdown()
    message = problems(1, optimizer__overlap_grad_reduce=False, optimizer__overlap_param_gather=True)
    assert "needs overlap_grad_reduce" in message


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}
# Rates of 12 steps of optimizer.lr=1.0 with 2 of warm-up, by hand from the formulas (arXiv 2404.06395 has WSD).
SCHEDULES = {
    "linear cooldown": (WSD | {"lr_wsd_decay_style": "linear"}, [0, 0.5, *[1.0] * 7, 0.75, 0.5, 0.25, 0.0]),
    "exponential": (WSD, [0, 0.5, *[1.0] * 7, *(2 * 0.5 ** (k / 4) - 1 for k in (1, 2, 3, 4))]),
    "minus_sqrt": (
        WSD | {"lr_wsd_decay_style": "minus_sqrt"},
        [0, 0.5, *[1.0] * 7, *(1 - (k / 4) ** 0.5 for k in (1, 2, 3, 4))],
    ),
    "a tenth by itself": (
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": "linear", "min_lr": 0.2},
        [0, 0.5, *[1.0] * 9, 0.6, 0.2],
    ),
    "constant with cooldown": (
        WSD | {"lr_wsd_decay_style": "linear", "lr_warmup_fraction": 0.0},
        [*[1.0] * 9, 0.75, 0.5, 0.25, 0.0],
    ),
    "inverse square root": (
        {"lr_decay_style": "inverse-square-root"},
        [0, 0.5, 1.0, *((2 / k) ** 0.5 for k in range(3, 13))],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_have_the_rates_of_their_formulas(name):
    fields, expected = SCHEDULES[name]
    options = OptimizerConfig(**{"lr": 1.0, "lr_warmup_fraction": 2 / 12} | fields)
    assert [rate_after(options, 12, updates) for updates in range(13)] == pytest.approx(expected)


def test_parts_of_the_model_have_rates_and_weight_decay_of_their_own():
    roles = RolesConfig(
        experts=RoleOptions(lr=4e-3, min_lr=2e-3),
        router=RoleOptions(weight_decay=0.5),
        projector=RoleOptions(lr=1e-4, weight_decay=0.25),
    )
    started = trainer(MoEConfig(), "fp32", roles=roles, weight_decay=0.1, router_lr_warmup_fraction=0.5)
    model, found = started.chunks[0], {}
    role_of = {parameter: (role, parameter.dim()) for role, _, parameter in parameter_roles(model)}
    for part in distributed_optimizers(started.optimizer):
        for parameter, (group, _) in part.model_param_group_index_map.items():
            options = part.optimizer.param_groups[group]
            found.setdefault(role_of[parameter], set()).add((options["lr"], options["min_lr"], options["weight_decay"]))
    assert found == {
        ("projector", 2): {(1e-4, 0.0, 0.25)},
        ("projector", 1): {(1e-4, 0.0, 0.0)},  # biases have no weight decay
        ("language.ffn", 2): {(1e-3, 0.0, 0.1)},
        ("experts", 2): {(4e-3, 2e-3, 0.1)},
        ("router", 2): {(0.0, 0.0, 0.5)},  # warms up
    }
    numbers, applied, _ = started.step()
    assert applied
    assert {name: value for name, value in numbers.items() if name.startswith("lr")} == {
        "lr": 1e-3,
        "lr/experts": 4e-3,
        "lr/projector": 1e-4,
    }


def test_projector_lr_is_the_rate_of_its_role():
    moved = []
    for fields in ({"projector_lr": 3e-3}, {"roles": RolesConfig(projector=RoleOptions(lr=3e-3))}):
        started = trainer(MoEConfig(), "fp32", **fields)
        started.step()
        moved.append([parameter.detach().clone() for parameter in started.chunks[0].parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*moved, strict=True))
